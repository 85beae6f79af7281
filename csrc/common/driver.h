// The CUDA driver's own functions, which make maps of tensors (tensor_map.h).
//
// On a CPU, for tests, tests/host/driver.h is in its place.
#pragma once

#include "common/tensor_map.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include "common/launch.h"

namespace vk {

class Driver {
public:
    static const Driver& loaded() {
        static const Driver driver;
        return driver;
    }

    bool has_context() const {
        CUcontext context = nullptr;
        return get_context(&context) == CUDA_SUCCESS && context != nullptr;
    }

    // That of the device which the caller made current, as the launch then finds it.
    void bind_context() const {
        int device = 0;
        check(cudaGetDevice(&device), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");  // binds since CUDA 12, even where the device stays the same
    }

    int encode(TensorMap& map, const TensorBlock& t, const void* base) const {
        cuuint64_t sizes[5], strides[4] = {};
        cuuint32_t block[5], steps[5];
        for (int i = 0; i < t.rank; ++i) {
            sizes[i] = t.sizes[i];
            block[i] = t.block[i];
            steps[i] = 1;
            if (i > 0) strides[i - 1] = t.strides[i];
        }
        CUtensorMapSwizzle swizzle = t.swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : t.swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                     : t.swizzle == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                                       : CU_TENSOR_MAP_SWIZZLE_NONE;
        return encode_tiled(&map, data_type(t.dtype), static_cast<cuuint32_t>(t.rank), const_cast<void*>(base), sizes,
                            strides, block, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // "none": zeros
    }

    std::string name_of(int result) const {
        const char* name = nullptr;
        error_name(static_cast<CUresult>(result), &name);
        return std::string(name ? name : "CUresult") + " (" + std::to_string(result) + ")";
    }

private:
    decltype(&cuTensorMapEncodeTiled) encode_tiled;
    decltype(&cuCtxGetCurrent) get_context;
    decltype(&cuGetErrorName) error_name;

    Driver() {
        find(encode_tiled, "cuTensorMapEncodeTiled");
        find(get_context, "cuCtxGetCurrent");
        find(error_name, "cuGetErrorName");
    }

    // In the driver that is loaded, so that nothing is linked with libcuda: a machine without a driver can import us.
    template <class Function>
    static void find(Function& to, const char* name) {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cudaError_t code = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result);
#else
        cudaError_t code = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result);
#endif
        if (code != cudaSuccess || result != cudaDriverEntryPointSuccess || function == nullptr) {
            cudaGetLastError();  // so that it is not reported again, to somebody else
            throw std::runtime_error("CUDA: no " + std::string(name) +
                                     " in the driver, it must be of CUDA 12 or later: " + cudaGetErrorName(code) +
                                     ", query result " + std::to_string(static_cast<int>(result)));
        }
        to = reinterpret_cast<Function>(function);
    }

    static CUtensorMapDataType data_type(Dtype d) {
        switch (d) {
            case Dtype::u8: case Dtype::i8: return CU_TENSOR_MAP_DATA_TYPE_UINT8;  // only copied
            case Dtype::i16: return CU_TENSOR_MAP_DATA_TYPE_UINT16;
            case Dtype::f16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
            case Dtype::bf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
            case Dtype::f32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
            case Dtype::f64: return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
            case Dtype::i32: return CU_TENSOR_MAP_DATA_TYPE_INT32;
            case Dtype::i64: return CU_TENSOR_MAP_DATA_TYPE_INT64;
        }
        throw std::runtime_error("no such dtype: " + std::to_string(static_cast<int>(d)));
    }
};

static_assert(SUCCESS == CUDA_SUCCESS && INVALID_VALUE == CUDA_ERROR_INVALID_VALUE, "as cuda.h numbers them");

}  // namespace vk

#else
#include "host/driver.h"
#endif

namespace vk {

inline TensorMap make_tensor_map(const TensorBlock& t, const void* base) {
    return make_tensor_map(t, base, Driver::loaded());
}

}  // namespace vk
