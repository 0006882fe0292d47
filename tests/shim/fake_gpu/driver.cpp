// The driver, through which bnfreeze launches. It refuses what a driver refuses: no context, one
// that is not the module's, another device's stream or memory, a vector at an odd address, loading
// while a stream is captured.

#include <dlfcn.h>

#include <sstream>

#include "device.h"

using namespace fake;

namespace {

struct Module {
    std::string image;
    Context *context;
};

struct Function {
    Module *module;
    bool vectors;  // whether it reads and writes sixteen bytes at a time
    void (*run)(const void *, unsigned, unsigned, unsigned);  // an entry point of cuda_shim.h
};

// Of the struct that is the kernel's one argument: its fourteen pointers come first, and of these
// the five to tensors of the input's shape.
constexpr size_t kArguments = 160, kPointers = 14, kTensors = 5;

unsigned seed;

// Not to be found by dlsym: NVRTC would go on to ask the driver for its private tables.
CUresult init(unsigned) { return CUDA_SUCCESS; }

}  // namespace

API CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice *which, int ordinal) {
    if (ordinal < 0 || ordinal >= devices) return CUDA_ERROR_INVALID_DEVICE;
    return *which = ordinal, CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice which) {
    return *context = reinterpret_cast<CUcontext>(&contexts[which]), CUDA_SUCCESS;
}
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) {
    return *flags = 0, *active = 1, CUDA_SUCCESS;
}
API CUresult cuCtxGetCurrent(CUcontext *context) {
    return *context = reinterpret_cast<CUcontext>(current), CUDA_SUCCESS;
}
API CUresult cuCtxSetCurrent(CUcontext context) {
    return current = reinterpret_cast<Context *>(context), CUDA_SUCCESS;
}
API CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode) {
    auto wanted = static_cast<cudaStreamCaptureMode>(*mode);
    *mode = static_cast<CUstreamCaptureMode>(capture_mode);
    capture_mode = wanted;
    return CUDA_SUCCESS;
}

API CUresult cuModuleLoadData(CUmodule *module, const void *image) {
    LOCK;
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    if (forbidden()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    auto bytes = static_cast<const char *>(image);
    // A cubin: an ELF file of the machine 190, which is CUDA. PTX would be text.
    if (std::memcmp(bytes, "\177ELF", 4) || bytes[18] != char(190))
        return CUDA_ERROR_INVALID_IMAGE;
    auto number = [=](size_t offset, size_t size) {
        size_t value = 0;
        std::memcpy(&value, bytes + offset, size);
        return value;
    };
    // Up to the end of the section headers, with which it ends.
    size_t size = number(40, 8) + number(58, 2) * number(60, 2);
    *module = reinterpret_cast<CUmodule>(new Module{std::string(bytes, size), current});
    return CUDA_SUCCESS;
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule handle, const char *name) {
    LOCK;
    auto module = reinterpret_cast<Module *>(handle);
    auto section = std::string(".text.") + name + '\0';
    if (module->image.find(section) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
    auto has = [=](const char *lanes) { return std::strstr(name, lanes) != nullptr; };
    bool vectors = has("_f32_4_") || has("_f16_8_") || has("_bf16_8_");
    auto made = new Function{module, vectors, nullptr};
    *function = reinterpret_cast<CUfunction>(made);
    const char *libraries = std::getenv("FAKE_GPU_KERNELS");
    if (!libraries) return CUDA_SUCCESS;
    std::istringstream paths(libraries);
    for (std::string path; std::getline(paths, path, ':');)
        if (void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL))
            if (void *run = dlsym(library, name))
                return std::memcpy(&made->run, &run, sizeof run), CUDA_SUCCESS;
    return CUDA_ERROR_NOT_FOUND;
}

API CUresult cuLaunchKernel(
    CUfunction handle, unsigned across, unsigned down, unsigned deep, unsigned x, unsigned y,
    unsigned z, unsigned shared, CUstream stream, void **arguments, void **extra
) {
    LOCK;
    auto function = reinterpret_cast<Function *>(handle);
    if (!current) return CUDA_ERROR_INVALID_CONTEXT;
    if (function->module->context != current || stream_of(stream)->device != current->device)
        return CUDA_ERROR_INVALID_HANDLE;
    bool sized = across && across < 1u << 31 && down && down < 1 << 16 && deep == 1;
    if (!sized || x != 256 || y != 1 || z != 1 || shared || extra) return CUDA_ERROR_INVALID_VALUE;
    auto pointers = static_cast<const void **>(arguments[0]);
    for (size_t i = 0; i < kPointers; ++i)
        if (pointers[i] && device_of(pointers[i]) != current->device)
            return CUDA_ERROR_ILLEGAL_ADDRESS;
    for (size_t i = 0; i < kTensors; ++i)
        if (function->vectors && reinterpret_cast<size_t>(pointers[i]) % 16)
            return CUDA_ERROR_MISALIGNED_ADDRESS;
    ++driver_launches;
    std::string kept(static_cast<const char *>(arguments[0]), kArguments);
    enqueue(stream, [=, run = function->run] {
        if (run) run(kept.data(), across, down, ++seed);
    });
    return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult, const char **text) {
    return *text = "an error of the fake GPU", CUDA_SUCCESS;
}
API CUresult cuGetErrorString(CUresult error, const char **text) {
    return cuGetErrorName(error, text);
}
API CUresult cuGetProcAddress_v2(
    const char *name, void **found, int, cuuint64_t, CUdriverProcAddressQueryResult *status
) {
    *found = dlsym(RTLD_DEFAULT, name);
    if (!std::strcmp(name, "cuInit")) *found = reinterpret_cast<void *>(&init);
    if (!std::strcmp(name, "cuGetProcAddress"))
        *found = reinterpret_cast<void *>(&cuGetProcAddress_v2);
    if (status)
        *status = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return *found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
API cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **found, unsigned, unsigned long long,
    cudaDriverEntryPointQueryResult *status
) {
    bool there = !cuGetProcAddress_v2(name, found, 0, 0, nullptr);
    if (status) *status = there ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
