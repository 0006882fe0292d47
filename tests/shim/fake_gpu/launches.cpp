// CUDA graphs, and the launches of what torch brings itself: kernels, and products of matrices.

#include <array>

#include "device.h"

using namespace fake;

API unsigned long fake_gpu_torch_launches() { return torch_launches; }
API unsigned long fake_gpu_driver_launches() { return driver_launches; }

// ------------------------------------------------------------------------------------------ graphs

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *mode) {
    return std::swap(*mode, capture_mode), cudaSuccess;
}
API cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    LOCK;
    if (reinterpret_cast<size_t>(stream) <= 2) return cudaErrorStreamCaptureUnsupported;
    auto graph = new Graph;
    graph->strict = mode != cudaStreamCaptureModeRelaxed;
    strict_captures += graph->strict;
    stream_of(stream)->capture = graph;
    return cudaSuccess;
}
API cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *ended) {
    LOCK;
    Graph *graph = stream_of(stream)->capture;
    if (!graph) return cudaErrorStreamCaptureInvalidated;
    for (Stream *each : streams)
        if (each->capture == graph) each->capture = nullptr;
    graph->open = false;
    strict_captures -= graph->strict;
    *ended = reinterpret_cast<cudaGraph_t>(graph);
    return cudaSuccess;
}
API cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
    LOCK;
    bool captured = stream_of(stream)->capture;
    *status = captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
#if CUDART_VERSION >= 13000
API cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **, const cudaGraphEdgeData **, size_t *dependencies
) {
#else
API cudaError_t cudaStreamGetCaptureInfo_v2(
    cudaStream_t stream, cudaStreamCaptureStatus *status, unsigned long long *id,
    cudaGraph_t *graph, const cudaGraphNode_t **, size_t *dependencies
) {
#endif
    LOCK;
    Graph *capture = stream_of(stream)->capture;
    cudaStreamIsCapturing(stream, status);
    if (id) *id = reinterpret_cast<size_t>(capture);
    if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture);
    if (dependencies) *dependencies = 0;
    return cudaSuccess;
}
API cudaError_t cudaGraphInstantiate(
    cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long
) {
    return *executable = reinterpret_cast<cudaGraphExec_t>(graph), cudaSuccess;
}
API cudaError_t cudaGraphInstantiateWithFlags(
    cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags
) {
    return cudaGraphInstantiate(executable, graph, flags);
}
API cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    LOCK;
    for (Work &work : reinterpret_cast<Graph *>(executable)->work) enqueue(stream, work);
    return cudaSuccess;
}
API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *, size_t *count) {
    return *count = reinterpret_cast<Graph *>(graph)->work.size(), cudaSuccess;
}
API cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

// ----------------------------------------------------------------------------------------- kernels

namespace {

thread_local std::vector<std::array<size_t, 8>> configurations;

int counted(void *stream) {
    LOCK;
    bound();
    ++torch_launches;
    enqueue(stream, [] {});
    return 0;
}

}  // namespace

API void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API void __cudaRegisterFunction(...) {}
API void __cudaRegisterVar(...) {}
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configurations.push_back({grid.x, grid.y, grid.z, block.x, block.y, block.z, shared,
                              reinterpret_cast<size_t>(stream)});
    return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    auto c = configurations.back();
    configurations.pop_back();
    *grid = dim3{unsigned(c[0]), unsigned(c[1]), unsigned(c[2])};
    *block = dim3{unsigned(c[3]), unsigned(c[4]), unsigned(c[5])};
    *shared = c[6];
    std::memcpy(stream, &c[7], sizeof c[7]);
    return cudaSuccess;
}
API int __cudaGetKernel(const void **kernel, const void *entry) { return *kernel = entry, 0; }
API int __cudaLaunchKernel(const void *, dim3, dim3, void **, size_t, cudaStream_t stream) {
    return counted(stream);
}
API cudaError_t cudaLaunchKernel(
    const void *, dim3, dim3, void **, size_t, cudaStream_t stream
) {
    return counted(stream), cudaSuccess;
}
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *, void **) {
    return counted(config->stream), cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
    std::memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(
    int *count, const void *, int, size_t
) {
    return *count = 2, cudaSuccess;
}

// ---------------------------------------------------------------------------- products of matrices

#define NOTHING(name) \
    API int name(...) { return 0; }
#define PRODUCT(name) \
    API int name(...) { return counted(nullptr); }

API int cublasCreate_v2(void **handle) { return *handle = &guard, 0; }
API int cublasGetMathMode(void *, int *mode) { return *mode = 0, 0; }
API int cublasGetPointerMode_v2(void *, int *mode) { return *mode = 0, 0; }
API int cublasLtMatmulPreferenceCreate(void **made) { return *made = &guard, 0; }
API int cublasLtMatmulDescCreate(void **made, ...) { return *made = &guard, 0; }
API int cublasLtMatrixLayoutCreate(void **made, ...) { return *made = &guard, 0; }
API int cublasLtMatmulAlgoGetHeuristic(
    void *, void *, void *, void *, void *, void *, void *, int, void *, int *found
) {
    return *found = 1, 0;
}
NOTHING(cublasDestroy_v2)
NOTHING(cublasSetMathMode)
NOTHING(cublasSetPointerMode_v2)
NOTHING(cublasSetSmCountTarget)
NOTHING(cublasSetStream_v2)
NOTHING(cublasSetWorkspace_v2)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
PRODUCT(cublasLtMatmul)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasGemmStridedBatchedEx)
