// Just enough CUDA for frozen_bn.cu to be compiled by a C++ compiler and run on a CPU.
//
// Each thread of a block is a fiber. A fiber runs until __syncthreads() or its end; the next one is
// drawn by lot, so that what a kernel computes without a barrier that it needs comes out wrong.
// Blocks run one after the other, in an order drawn by lot as well.

#define BNFREEZE_SHIM

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static

struct Index {
    unsigned x, y, z;
};

namespace shim {

constexpr unsigned kThreads = 256;
constexpr size_t kStack = 256 * 1024;

struct Fiber {
    ucontext_t context;
    Index thread;
    bool waits, done;
    std::vector<char> stack = std::vector<char>(kStack);
};

inline std::vector<Fiber> fibers(kThreads);
inline Fiber *current;
inline ucontext_t scheduler;
inline Index block, grid;
inline std::function<void()> kernel;

inline void enter() {
    kernel();
    current->done = true;
}

inline void run_block(std::mt19937 &lot) {
    for (unsigned t = 0; t < kThreads; ++t) {
        Fiber &fiber = fibers[t];
        fiber.thread = {t, 0, 0};
        fiber.waits = fiber.done = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    std::vector<unsigned> order(kThreads);
    std::iota(order.begin(), order.end(), 0u);
    for (;;) {
        std::shuffle(order.begin(), order.end(), lot);
        unsigned waiting = 0;
        for (unsigned t : order) {
            current = &fibers[t];
            if (current->done) continue;
            current->waits = false;
            swapcontext(&scheduler, &current->context);
            waiting += current->waits;
        }
        if (waiting == 0) return;
        if (waiting != kThreads) {
            std::fprintf(stderr, "shim: %u of %u threads reach a barrier\n", waiting, kThreads);
            std::abort();
        }
    }
}

inline void launch(std::function<void()> body, unsigned across, unsigned down, unsigned seed) {
    kernel = std::move(body);
    grid = {across, down, 1};
    std::mt19937 lot(seed);
    std::vector<unsigned> order(across * down);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), lot);
    for (unsigned b : order) {
        block = {b % across, b / across, 0};
        run_block(lot);
    }
}

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

}  // namespace shim

#define threadIdx (shim::current->thread)
#define blockIdx (shim::block)
#define gridDim (shim::grid)

inline void __syncthreads() {
    shim::current->waits = true;
    swapcontext(&shim::current->context, &shim::scheduler);
}

inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline unsigned __float_as_uint(float value) { return shim::bits<unsigned>(value); }
inline float __uint_as_float(unsigned value) { return shim::bits<float>(value); }
inline float rsqrtf(float value) { return (float)(1.0 / std::sqrt((double)value)); }
inline float reciprocal(float value) { return 1.0f / value; }

inline float from_f16(unsigned short value) { return (float)shim::bits<_Float16>(value); }
inline unsigned short to_f16(float value) { return shim::bits<unsigned short>((_Float16)value); }
inline unsigned short to_bf16(float value) {
    unsigned u = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (unsigned short)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

#define ENTRY(name, ...)                                                                      \
    extern "C" void name(const void *args, unsigned across, unsigned down, unsigned seed) {   \
        shim::launch([=] { __VA_ARGS__(*(const Args *)args); }, across, down, seed);          \
    }
