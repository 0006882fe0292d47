// Devices, memory, streams and events.

#include "device.h"

using namespace fake;

namespace {

struct Start {
    Start() {
        for (int i = 0; i < kMost; ++i) {
            contexts[i].device = defaults[i].device = i;
            streams.insert(&defaults[i]);
        }
    }
} start;

void drain_all() {
    for (Stream *stream : streams) stream->drain();
}

// From pageable memory the bytes are taken at once; into it, they are there on return.
void copy(void *to, const void *from, size_t size, void *stream) {
    if (device_of(from) >= 0) {
        enqueue(stream, [=] { std::memcpy(to, from, size); });
        if (device_of(to) < 0) stream_of(stream)->drain();
    } else {
        std::string kept(static_cast<const char *>(from), size);
        enqueue(stream, [=] { std::memcpy(to, kept.data(), size); });
    }
}

}  // namespace

API cudaError_t cudaGetDeviceCount(int *count) { return *count = devices, cudaSuccess; }
API cudaError_t cudaGetDevice(int *which) { return *which = device(), cudaSuccess; }
API cudaError_t cudaSetDevice(int which) {
    if (which < 0 || which >= devices) return cudaErrorInvalidDevice;
    current = &contexts[which];
    return cudaSuccess;
}
API cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDA_VERSION, cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *version) {
    return *version = CUDART_VERSION, cudaSuccess;
}
API cudaError_t cudaGetLastError() { return cudaSuccess; }
API cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int which) {
    std::memset(properties, 0, sizeof *properties);
    std::strcpy(properties->name, "bnfreeze's fake GPU");
    properties->major = which ? 8 : 9;  // no two devices are alike
    properties->multiProcessorCount = which ? 5 : 3;  // few, so that a thread walks many rows
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = properties->maxThreadsPerMultiProcessor = 1024;
    properties->totalGlobalMem = size_t(8) << 30;
    properties->sharedMemPerBlock = properties->sharedMemPerMultiprocessor = 48 << 10;
    properties->l2CacheSize = 4 << 10;
    for (int i = 0; i < 3; ++i) properties->maxGridSize[i] = properties->maxThreadsDim[i] = 65535;
    return cudaSuccess;
}
API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    return *value = 0, cudaSuccess;
}
API cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    return *least = 0, *greatest = -1, cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
    return *free = *total = size_t(8) << 30, cudaSuccess;
}
API cudaError_t cudaMalloc(void **pointer, size_t size) {
    LOCK;
    if (forbidden()) return cudaErrorStreamCaptureUnsupported;
    *pointer = std::aligned_alloc(512, (size + 511) / 512 * 512);
    if (!*pointer) return cudaErrorMemoryAllocation;
    std::memset(*pointer, 0xff, size);
    blocks[static_cast<char *>(*pointer)] = {size, bound()};
    return cudaSuccess;
}
API cudaError_t cudaFree(void *pointer) {
    LOCK;
    bound();
    drain_all();
    blocks.erase(static_cast<char *>(pointer));
    std::free(pointer);
    return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned) {
    return *pointer = std::malloc(size), cudaSuccess;
}
API cudaError_t cudaFreeHost(void *pointer) { return std::free(pointer), cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *) {
    std::memset(attributes, 0, sizeof *attributes);
    return cudaSuccess;
}
API cudaError_t cudaMemcpyAsync(
    void *to, const void *from, size_t size, cudaMemcpyKind, cudaStream_t stream
) {
    LOCK;
    bound();
    copy(to, from, size, stream);
    return cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t size, cudaMemcpyKind) {
    LOCK;
    bound();
    copy(to, from, size, nullptr);
    stream_of(nullptr)->drain();
    return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
    LOCK;
    bound();
    enqueue(stream, [=] { std::memset(pointer, value, size); });
    return cudaSuccess;
}
API cudaError_t cudaDeviceSynchronize() {
    LOCK;
    bound();
    drain_all();
    return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
    LOCK;
    auto made = new Stream;
    made->device = bound();
    streams.insert(made);
    *stream = reinterpret_cast<cudaStream_t>(made);
    return cudaSuccess;
}
API cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    LOCK;
    stream_of(stream)->drain();
    return cudaSuccess;  // kept, for events may point to it
}
API cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    LOCK;
    bound();
    if (stream_of(stream)->capture) return cudaErrorStreamCaptureUnsupported;
    stream_of(stream)->drain();
    return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaStreamSynchronize(stream); }

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
API cudaError_t cudaEventDestroy(cudaEvent_t event) {
    return delete reinterpret_cast<Event *>(event), cudaSuccess;
}
API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream) {
    LOCK;
    bound();
    auto event = reinterpret_cast<Event *>(handle);
    event->stream = stream_of(stream);
    event->until = event->stream->enqueued;
    event->capture = event->stream->capture;
    clock_gettime(CLOCK_MONOTONIC, &event->time);
    return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
    return cudaEventRecord(event, stream);
}
API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    LOCK;
    auto event = reinterpret_cast<Event *>(handle);
    if (event->stream) event->stream->run(event->until);
    return cudaSuccess;
}
API cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
API cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t begin, cudaEvent_t end) {
    auto &a = reinterpret_cast<Event *>(begin)->time, &b = reinterpret_cast<Event *>(end)->time;
    *milliseconds = float((b.tv_sec - a.tv_sec) * 1e3 + (b.tv_nsec - a.tv_nsec) * 1e-6);
    return cudaSuccess;
}
API cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t handle, unsigned) {
    LOCK;
    auto event = reinterpret_cast<Event *>(handle);
    if (event->capture && event->capture->open)
        stream_of(stream)->capture = event->capture;
    else if (event->stream && event->stream != stream_of(stream))
        enqueue(stream, [from = event->stream, until = event->until] { from->run(until); });
    return cudaSuccess;
}
