// Frozen batch norm, with the residual add and the activation that follow it.
//
//     z = (x - mean[c]) * scale[c] + bias[c] + residual        scale = weight / sqrt(var + eps)
//     y = activation(z)
//
// One pass over memory, forward and backward. A "mapping" says which thread computes which
// elements; two mappings cover every dense tensor. An "op" says what is done with an element:
//
//   planes   for (N, C, *) contiguous: the tensor is one long array; the channel of an element is
//            (i / plane) % channels.
//   rows     for channels last, and (N, C): a matrix (rows, channels). A thread keeps its channels
//            and goes down the rows.
//   planes_trained   as planes, but a block keeps one channel, for the sums over it.
//   finish   adds the partial sums of the blocks, always in the same order.
//
// scale is computed here from weight, var and eps, in every launch, so it is never out of date. The
// arithmetic is fp32; a result is rounded once. Contraction is off (--fmad=false) and every fused
// multiply-add is written out, so that a CPU computes the same bits.
//
// There are no includes, because NVRTC has no header files. The launcher appends an entry point for
// each variant that is used:
//
//     ENTRY(name, planes<f16, 8, Forward<RELU, ADD>, false>)
//
// A program that defines BNFREEZE_SHIM has its own ENTRY, conversions and built-ins. The tests use
// this to run the source on a CPU.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 THREADS = 256;
constexpr u32 UNROLL = 4;  // vectors in flight in each thread, for each array that is read

enum Activation { NONE, RELU, RELU6, SILU, HARDSWISH };  // the names in activations.py
enum Residual { ALONE, ADD, AFFINE_ADD };  // AFFINE_ADD: the residual has a norm layer of its own

// Laid out as launch.py packs it.
struct Args {
    // forward: x, residual, -.   backward: the output's gradient, what the activation kept, x.
    const void *in0, *in1, *in2;
    // forward: y, z or null.   backward: the gradients of x and of the residual; each may be null.
    void *out0, *out1;
    const float *mean, *var;
    const void *weight, *bias;  // null: there is none
    const float *mean_r, *var_r;
    const void *weight_r, *bias_r;
    float *partial;  // [2][blocks][channels]: sums of g, and of g * (x - mean)
    float eps, eps_r;
    u32 kind, kind_r;  // the dtype of weight and bias: 0 fp32, 1 fp16, 2 bf16
    u64 size;          // planes: elements. rows: rows. planes_trained: see there. finish: blocks
    u32 channels, channels_magic, channels_shift;
    u32 plane, plane_magic, plane_shift;  // in elements; planes_trained: in vectors
};

// ---------------------------------------------------------------------------------------- numbers

#ifndef BNFREEZE_SHIM
#define ENTRY(name, ...)                                                                           \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                       \
    name(const __grid_constant__ Args args) {                                                      \
        __VA_ARGS__(args);                                                                         \
    }

__device__ __forceinline__ float from_f16(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ u16 to_f16(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

__device__ __forceinline__ u16 to_bf16(float value) {
#if __CUDA_ARCH__ >= 800
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    if (value != value) return 0x7fff;
    u32 bits = __float_as_uint(value);
    return (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
#endif
}

// Good to one unit in the last place; 0 for infinity.
__device__ __forceinline__ float reciprocal(float value) {
    float result;
    asm("rcp.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
#endif

__device__ __forceinline__ float from_bf16(u16 bits) { return __uint_as_float((u32)bits << 16); }

struct f32 {
    typedef float raw;
    __device__ __forceinline__ static float read(raw value) { return value; }
    __device__ __forceinline__ static raw round(float value) { return value; }
};

struct f16 {
    typedef u16 raw;
    __device__ __forceinline__ static float read(raw value) { return from_f16(value); }
    __device__ __forceinline__ static raw round(float value) { return to_f16(value); }
};

struct bf16 {
    typedef u16 raw;
    __device__ __forceinline__ static float read(raw value) { return from_bf16(value); }
    __device__ __forceinline__ static raw round(float value) { return to_bf16(value); }
};

// n / d for n < 2^31, by the multiplication that fast_division in plan.py prepares.
__device__ __forceinline__ u32 divide(u32 n, u32 magic, u32 shift) {
    return (__umulhi(n, magic) + n) >> shift;
}

// ---------------------------------------------------------------------------------------- vectors

template <class T, int V>
struct alignas(sizeof(typename T::raw) * V) Pack {
    typename T::raw lane[V];
};

template <class T, int V>
__device__ __forceinline__ Pack<T, V> load(const void *from, u64 i) {
    return *(const Pack<T, V> *)((const typename T::raw *)from + i);
}

template <class T, int V>
__device__ __forceinline__ void store(void *to, u64 i, const Pack<T, V> &pack) {
    *(Pack<T, V> *)((typename T::raw *)to + i) = pack;
}

// --------------------------------------------------------------------------------------- channels

struct Channel {
    float mean, scale, bias;
};

__device__ __forceinline__ float parameter(const void *from, u32 kind, u32 c) {
    if (kind == 0) return ((const float *)from)[c];
    u16 bits = ((const u16 *)from)[c];
    return kind == 1 ? from_f16(bits) : from_bf16(bits);
}

__device__ __forceinline__ void set_parameter(void *to, u32 kind, u32 c, float value) {
    if (kind == 0)
        ((float *)to)[c] = value;
    else
        ((u16 *)to)[c] = kind == 1 ? to_f16(value) : to_bf16(value);
}

__device__ __forceinline__ float invstd(const float *var, float eps, u32 c) {
    return rsqrtf(var[c] + eps);  // good to two units in the last place, as in ATen's kernels
}

__device__ __forceinline__ Channel channel(const Args &a, u32 c) {
    float scale = invstd(a.var, a.eps, c);
    if (a.weight) scale *= parameter(a.weight, a.kind, c);
    return {a.mean[c], scale, a.bias ? parameter(a.bias, a.kind, c) : 0.0f};
}

__device__ __forceinline__ Channel branch_channel(const Args &a, u32 c) {
    float scale = invstd(a.var_r, a.eps_r, c);
    if (a.weight_r) scale *= parameter(a.weight_r, a.kind_r, c);
    return {a.mean_r[c], scale, a.bias_r ? parameter(a.bias_r, a.kind_r, c) : 0.0f};
}

// Member by member, so that it stays in registers. A choice between two structs needs addresses.
__device__ __forceinline__ Channel pick(bool first, const Channel &n, const Channel &m) {
    return {first ? n.mean : m.mean, first ? n.scale : m.scale, first ? n.bias : m.bias};
}

__device__ __forceinline__ float normalise(float x, const Channel &n) {
    return fmaf(x - n.mean, n.scale, n.bias);
}

// -------------------------------------------------------------------------------------------- ops

__device__ __forceinline__ float sigmoid(float z) { return reciprocal(1.0f + expf(-z)); }

// Comparisons are written so that NaN passes through, as in ATen.
template <int ACT>
__device__ __forceinline__ float activate(float z) {
    if (ACT == RELU) return z <= 0.0f ? 0.0f : z;
    if (ACT == RELU6) return z <= 0.0f ? 0.0f : z >= 6.0f ? 6.0f : z;
    if (ACT == SILU) return z * sigmoid(z);
    if (ACT == HARDSWISH) {
        float t = z + 3.0f;
        t = t < 0.0f ? 0.0f : t > 6.0f ? 6.0f : t;
        return z * t * (1.0f / 6.0f);
    }
    return z;
}

// Whether backward needs what goes into the activation. Otherwise it needs the output.
template <int ACT>
constexpr bool from_input = ACT == SILU || ACT == HARDSWISH;

// g times the derivative; kept is the input or the output of the activation (see from_input).
template <int ACT>
__device__ __forceinline__ float deactivate(float g, float kept) {
    if (ACT == RELU) return kept <= 0.0f ? 0.0f : g;
    if (ACT == RELU6) return kept <= 0.0f || kept >= 6.0f ? 0.0f : g;
    if (ACT == SILU) {
        float s = sigmoid(kept);
        return g * s * (1.0f + kept * (1.0f - s));
    }
    if (ACT == HARDSWISH) {
        if (kept <= -3.0f) return 0.0f;
        return kept < 3.0f ? g * (fmaf(kept, 1.0f / 3.0f, 0.5f)) : g;
    }
    return g;
}

template <int ACT, int RES>
struct Forward {
    static constexpr bool reads1 = RES != ALONE;
    static constexpr bool branch = RES == AFFINE_ADD;
    // z, if backward needs it and cannot compute it from x alone
    static constexpr bool writes1 = RES != ALONE && from_input<ACT>;

    __device__ __forceinline__ static void run(float x, float residual, const Channel &n,
                                               const Channel &r, float &y, float &z) {
        z = normalise(x, n);
        if (RES == ADD) z += residual;
        if (RES == AFFINE_ADD) z += normalise(residual, r);
        y = activate<ACT>(z);
    }
};

template <int ACT, int RES>
struct Backward {
    static constexpr bool keeps_x = RES == ALONE && from_input<ACT>;  // x, and not z
    static constexpr bool reads1 = ACT != NONE;
    static constexpr bool branch = RES == AFFINE_ADD;
    static constexpr bool writes1 = RES != ALONE;

    // The gradient of z.
    __device__ __forceinline__ static float inner(float g, float kept, const Channel &n) {
        return deactivate<ACT>(g, keeps_x ? normalise(kept, n) : kept);
    }

    __device__ __forceinline__ static void run(float g, float kept, const Channel &n,
                                               const Channel &r, float &grad_x, float &grad_r) {
        float grad = inner(g, kept, n);
        grad_x = grad * n.scale;
        grad_r = RES == AFFINE_ADD ? grad * r.scale : grad;
    }
};

// --------------------------------------------------------------------------------------- mappings

// A vector may reach into the next plane but not further, because a plane has at least V elements.
// The elements at the very end that do not fill a vector are computed one by one.
//
// WIDE: more than 2^31 elements. The block finds its place by one 64-bit division; within the block
// 32 bits are enough.
template <class T, int V, class Op, bool WIDE>
__device__ __forceinline__ void planes(const Args &a) {
    constexpr u32 TILE = THREADS * UNROLL * V;
    const u64 base = (u64)blockIdx.x * TILE;
    u32 start = (u32)base, first = 0;  // the place in a plane, and the channel, of the block's first
    if (WIDE) {
        u64 plane = base / a.plane;
        start = (u32)(base - plane * a.plane);
        first = (u32)(plane % a.channels);
    }

    Pack<T, V> in0[UNROLL], in1[UNROLL];
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u) {
        u64 i = base + (u * THREADS + threadIdx.x) * V;
        if (i + V > a.size) break;
        in0[u] = load<T, V>(a.in0, i);
        if (Op::reads1) in1[u] = load<T, V>(a.in1, i);
    }

    u32 known = ~0u;  // the channel that n and r are of
    Channel n = {}, r = {};
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u) {
        u32 local = (u * THREADS + threadIdx.x) * V;
        u64 i = base + local;
        if (i + V > a.size) break;
        u32 plane = divide(start + local, a.plane_magic, a.plane_shift);
        u32 left = (plane + 1) * a.plane - (start + local);  // elements to the plane's end
        u32 c = first + plane;
        c -= divide(c, a.channels_magic, a.channels_shift) * a.channels;
        if (c != known) {
            known = c;
            n = channel(a, c);
            if (Op::branch) r = branch_channel(a, c);
        }
        Channel n_next = n, r_next = r;
        if (V > 1 && left < V) {
            u32 next = c + 1 == a.channels ? 0 : c + 1;
            n_next = channel(a, next);
            if (Op::branch) r_next = branch_channel(a, next);
        }
        Pack<T, V> out0, out1;
#pragma unroll
        for (u32 k = 0; k < V; ++k) {
            float v1 = Op::reads1 ? T::read(in1[u].lane[k]) : 0.0f;
            float o0, o1;
            Op::run(T::read(in0[u].lane[k]), v1, pick(k < left, n, n_next),
                    pick(k < left, r, r_next), o0, o1);
            out0.lane[k] = T::round(o0);
            if (Op::writes1) out1.lane[k] = T::round(o1);
        }
        if (a.out0) store<T, V>(a.out0, i, out0);
        if (Op::writes1 && a.out1) store<T, V>(a.out1, i, out1);
    }

    if (V > 1 && blockIdx.x == gridDim.x - 1 && threadIdx.x < a.size % V) {
        u64 i = a.size - 1 - threadIdx.x;
        u32 c = a.channels - 1;  // the last plane has at least V elements
        n = channel(a, c);
        if (Op::branch) r = branch_channel(a, c);
        float v1 = Op::reads1 ? T::read(load<T, 1>(a.in1, i).lane[0]) : 0.0f;
        float o0, o1;
        Op::run(T::read(load<T, 1>(a.in0, i).lane[0]), v1, n, r, o0, o1);
        if (a.out0) store<T, 1>(a.out0, i, {T::round(o0)});
        if (Op::writes1 && a.out1) store<T, 1>(a.out1, i, {T::round(o1)});
    }
}

// A block spans as many whole groups of V channels as fit, and as many rows at once as it can.
template <class T, int V, class Op, bool TRAINED>
__device__ __forceinline__ void rows(const Args &a) {
    constexpr u32 AHEAD = Op::reads1 || TRAINED ? UNROLL / 2 : UNROLL;
    const u32 groups = a.channels / V;  // V divides channels
    const u32 width = groups < THREADS ? groups : THREADS;
    const u32 height = THREADS / width;
    const u32 y = threadIdx.x / width;
    const u32 group = blockIdx.y * THREADS + (threadIdx.x - y * width);
    const bool active = y < height && group < groups;
    const u32 c = group * V;
    const u64 stride = (u64)gridDim.x * height;

    float sum[V] = {}, dot[V] = {};
    if (active) {
        Channel n[V], r[V];
#pragma unroll
        for (int k = 0; k < V; ++k) {
            n[k] = channel(a, c + k);
            r[k] = Op::branch ? branch_channel(a, c + k) : Channel{};
        }
        for (u64 row = (u64)blockIdx.x * height + y; row < a.size; row += stride * AHEAD) {
            Pack<T, V> in0[AHEAD], in1[AHEAD], in2[AHEAD];
#pragma unroll
            for (u32 u = 0; u < AHEAD; ++u) {
                if (row + u * stride >= a.size) break;
                u64 i = (row + u * stride) * a.channels + c;
                in0[u] = load<T, V>(a.in0, i);
                if (Op::reads1) in1[u] = load<T, V>(a.in1, i);
                if constexpr (TRAINED)
                    in2[u] = Op::keeps_x ? in1[u] : load<T, V>(a.in2, i);
            }
#pragma unroll
            for (u32 u = 0; u < AHEAD; ++u) {
                if (row + u * stride >= a.size) break;
                u64 i = (row + u * stride) * a.channels + c;
                Pack<T, V> out0, out1;
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    float v0 = T::read(in0[u].lane[k]);
                    float v1 = Op::reads1 ? T::read(in1[u].lane[k]) : 0.0f;
                    float o0, o1;
                    Op::run(v0, v1, n[k], r[k], o0, o1);
                    out0.lane[k] = T::round(o0);
                    if (Op::writes1) out1.lane[k] = T::round(o1);
                    if constexpr (TRAINED) {
                        float grad = Op::inner(v0, v1, n[k]);
                        sum[k] += grad;
                        dot[k] = fmaf(grad, T::read(in2[u].lane[k]) - n[k].mean, dot[k]);
                    }
                }
                if (a.out0) store<T, V>(a.out0, i, out0);
                if (Op::writes1 && a.out1) store<T, V>(a.out1, i, out1);
            }
        }
    }

    if constexpr (TRAINED) {
        // The rows of the block are added in pairs, always the same pairs.
        __shared__ float shared[2 * V][THREADS];
#pragma unroll
        for (int k = 0; k < V; ++k) {
            shared[k][threadIdx.x] = sum[k];
            shared[V + k][threadIdx.x] = dot[k];
        }
        for (u32 half = THREADS / 2; half; half /= 2) {
            __syncthreads();
            if (y < half && y + half < height) {
#pragma unroll
                for (int k = 0; k < 2 * V; ++k)
                    shared[k][threadIdx.x] += shared[k][threadIdx.x + half * width];
            }
        }
        if (active && y == 0) {
#pragma unroll
            for (int k = 0; k < V; ++k) {
                u64 at = (u64)blockIdx.x * a.channels + c + k;
                a.partial[at] = shared[k][threadIdx.x];
                a.partial[at + (u64)gridDim.x * a.channels] = shared[V + k][threadIdx.x];
            }
        }
    }
}

// Block (c, y) takes the y-th share of channel c. A plane is a.plane whole vectors; a channel has
// a.size vectors, fewer than 2^31.
template <class T, int V, class Op>
__device__ __forceinline__ void planes_trained(const Args &a) {
    constexpr u32 AHEAD = UNROLL / 2;
    const u32 c = blockIdx.x;
    const u64 stride = (u64)gridDim.y * THREADS;
    const Channel n = channel(a, c);
    const Channel r = Op::branch ? branch_channel(a, c) : Channel{};
    float sum = 0.0f, dot = 0.0f;
    for (u64 j = (u64)blockIdx.y * THREADS + threadIdx.x; j < a.size; j += stride * AHEAD) {
        Pack<T, V> in0[AHEAD], in1[AHEAD], in2[AHEAD];
        u64 at[AHEAD];
#pragma unroll
        for (u32 u = 0; u < AHEAD; ++u) {
            if (j + u * stride >= a.size) break;
            u32 vector = (u32)(j + u * stride);
            u32 image = divide(vector, a.plane_magic, a.plane_shift);
            u32 place = vector - image * a.plane;
            at[u] = (((u64)image * a.channels + c) * a.plane + place) * V;
            in0[u] = load<T, V>(a.in0, at[u]);
            if (Op::reads1) in1[u] = load<T, V>(a.in1, at[u]);
            in2[u] = Op::keeps_x ? in1[u] : load<T, V>(a.in2, at[u]);
        }
#pragma unroll
        for (u32 u = 0; u < AHEAD; ++u) {
            if (j + u * stride >= a.size) break;
            Pack<T, V> out0, out1;
#pragma unroll
            for (int k = 0; k < V; ++k) {
                float v0 = T::read(in0[u].lane[k]);
                float v1 = Op::reads1 ? T::read(in1[u].lane[k]) : 0.0f;
                float o0, o1;
                Op::run(v0, v1, n, r, o0, o1);
                out0.lane[k] = T::round(o0);
                if (Op::writes1) out1.lane[k] = T::round(o1);
                float grad = Op::inner(v0, v1, n);
                sum += grad;
                dot = fmaf(grad, T::read(in2[u].lane[k]) - n.mean, dot);
            }
            if (a.out0) store<T, V>(a.out0, at[u], out0);
            if (Op::writes1 && a.out1) store<T, V>(a.out1, at[u], out1);
        }
    }

    __shared__ float shared[2][THREADS];
    shared[0][threadIdx.x] = sum;
    shared[1][threadIdx.x] = dot;
    for (u32 half = THREADS / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            shared[0][threadIdx.x] += shared[0][threadIdx.x + half];
            shared[1][threadIdx.x] += shared[1][threadIdx.x + half];
        }
    }
    if (threadIdx.x == 0) {
        u64 at = (u64)blockIdx.y * a.channels + c;
        a.partial[at] = shared[0][0];
        a.partial[at + (u64)gridDim.y * a.channels] = shared[1][0];
    }
}

// out0, out1: the gradients of weight and bias, of the dtype a.kind; each may be null.
__device__ __forceinline__ void finish(const Args &a) {
    constexpr u32 WIDTH = 32, HEIGHT = THREADS / WIDTH;
    __shared__ float shared[2][HEIGHT][WIDTH];
    const u32 x = threadIdx.x % WIDTH, y = threadIdx.x / WIDTH;
    const u32 c = blockIdx.x * WIDTH + x;
    float sum = 0.0f, dot = 0.0f;
    if (c < a.channels) {
        for (u64 block = y; block < a.size; block += HEIGHT) {
            sum += a.partial[block * a.channels + c];
            dot += a.partial[(a.size + block) * a.channels + c];
        }
    }
    shared[0][y][x] = sum;
    shared[1][y][x] = dot;
    __syncthreads();
    if (y == 0 && c < a.channels) {
#pragma unroll
        for (u32 k = 1; k < HEIGHT; ++k) {
            sum += shared[0][k][x];
            dot += shared[1][k][x];
        }
        if (a.out0) set_parameter(a.out0, a.kind, c, dot * invstd(a.var, a.eps, c));
        if (a.out1) set_parameter(a.out1, a.kind, c, sum);
    }
}
