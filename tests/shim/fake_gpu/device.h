// A CUDA device made of host memory: just enough of CUDA's runtime and driver for a CUDA build of
// torch to put tensors on it, and for bnfreeze to launch its kernel there.
//
// Preloaded into a process, it answers in place of libcudart and libcuda (fake_gpu.py compiles and
// preloads it). What is enqueued on a stream runs late, when somebody waits for it or asks after it;
// so what is enqueued on the wrong stream reads what is not there yet. A graph replays as one chain.
// New memory is full of NaN. Torch's own kernels are there for a GPU only: their launches are
// counted, and compute nothing.
//
//     FAKE_GPU_DEVICES   how many devices there are
//     FAKE_GPU_KERNELS   libraries with the kernels for the CPU, split by ":"; if it is not set, a
//                        launch through the driver computes nothing either

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <ctime>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))
#define LOCK std::lock_guard<std::recursive_mutex> lock(fake::guard)

namespace fake {

using Work = std::function<void()>;

struct Graph {
    std::vector<Work> work;
    bool open = true;  // still being captured
    bool strict;       // in a mode that forbids some calls meanwhile
};

struct Context {
    int device;
};

struct Stream {
    int device;
    std::deque<Work> queue;
    size_t enqueued = 0, done = 0;
    Graph *capture = nullptr;

    void run(size_t until) {
        while (done < until && !queue.empty()) {
            Work work = std::move(queue.front());
            queue.pop_front();
            ++done;
            work();
        }
    }
    void drain() { run(enqueued); }
};

struct Event {
    Stream *stream = nullptr;
    size_t until = 0;  // what the stream had been given when the event was recorded
    Graph *capture = nullptr;
    timespec time{};
};

struct Block {
    size_t size;
    int device;
};

constexpr int kMost = 8;

inline std::recursive_mutex guard;
inline const int devices = std::atoi(std::getenv("FAKE_GPU_DEVICES"));
inline Context contexts[kMost];
inline Stream defaults[kMost];
inline std::map<const char *, Block> blocks;
inline std::set<Stream *> streams;
inline int strict_captures;
inline unsigned long torch_launches, driver_launches;

inline thread_local Context *current;
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;

// The thread's device. As with CUDA, no context is made current by asking.
inline int device() { return current ? current->device : 0; }

// What the runtime does before it works, and the driver never: make the primary context current.
inline int bound() {
    if (!current) current = &contexts[0];
    return current->device;
}

// 0, 1 and 2 are the names of default streams.
inline Stream *stream_of(void *handle) {
    return reinterpret_cast<size_t>(handle) <= 2 ? &defaults[device()]
                                                 : static_cast<Stream *>(handle);
}

inline void enqueue(void *handle, Work work) {
    Stream *stream = stream_of(handle);
    if (stream->capture) {
        stream->capture->work.push_back(std::move(work));
    } else {
        stream->queue.push_back(std::move(work));
        ++stream->enqueued;
    }
}

// Whether a call that a capture does not allow would spoil one.
inline bool forbidden() { return strict_captures && capture_mode != cudaStreamCaptureModeRelaxed; }

// The device whose memory a pointer points into, or -1.
inline int device_of(const void *pointer) {
    auto next = blocks.upper_bound(static_cast<const char *>(pointer));
    if (next == blocks.begin()) return -1;
    auto &[begin, block] = *--next;
    return static_cast<const char *>(pointer) < begin + block.size ? block.device : -1;
}

}  // namespace fake
