// Tensors as the copy engine of sm_90 takes them: what a map describes, why the driver would refuse it, and the map.
#pragma once

#include <stdexcept>
#include <string>

#include "primitives.cuh"
#include "problem.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

namespace vk {

// A tensor in global memory and the block of it that one copy_tensor brings. All are innermost first.
struct TensorBlock {
    Dtype dtype;
    int rank;
    uint64_t sizes[5];    // in elements; what lies outside is read as zeros
    uint64_t strides[5];  // in bytes; [0] is the size of an element
    uint32_t block[5];    // in elements
    int swizzle;          // span in bytes within which 16-byte pieces change places: 32, 64 or 128; 0: none
};

// Why the driver would refuse a map of this tensor, or nothing (CUDA driver API, cuTensorMapEncodeTiled).
inline std::string refused(const TensorBlock& t, const void* base) {
    auto at = [](const char* name, int i, uint64_t value) {
        return std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(value);
    };
    uint64_t size = static_cast<uint64_t>(size_of(t.dtype));
    if (t.rank < 1 || t.rank > 5) return "rank " + std::to_string(t.rank) + " is not in 1 … 5";
    if (t.swizzle != 0 && t.swizzle != 32 && t.swizzle != 64 && t.swizzle != 128)
        return "swizzle of " + std::to_string(t.swizzle) + " bytes is none of 0, 32, 64 and 128";
    if (base == nullptr) return "base address is null";
    if (uint64_t off = reinterpret_cast<uintptr_t>(base) % 16)
        return "base address is " + std::to_string(off) + " bytes past a multiple of 16";
    if (t.strides[0] != size)
        return at("strides", 0, t.strides[0]) + " is not the element's size, " + std::to_string(size);
    for (int i = 0; i < t.rank; ++i) {
        uint64_t stride = t.strides[i];
        if (t.sizes[i] < 1 || t.sizes[i] > uint64_t{1} << 32) return at("sizes", i, t.sizes[i]) + " is not in 1 … 2^32";
        if (t.block[i] < 1 || t.block[i] > 256) return at("block", i, t.block[i]) + " is not in 1 … 256";
        if (i > 0 && stride % 16) return at("strides", i, stride) + " bytes is not a multiple of 16";
        if (i > 0 && stride >= uint64_t{1} << 40) return at("strides", i, stride) + " bytes is not below 2^40";
    }
    uint64_t row = t.block[0] * size;
    std::string row_is = at("block", 0, t.block[0]) + " of " + std::to_string(size) + " bytes: " + std::to_string(row);
    if (row % 16) return row_is + " is not a multiple of 16";
    if (t.swizzle && row > static_cast<uint64_t>(t.swizzle))
        return row_is + " is more than the swizzle's " + std::to_string(t.swizzle);
    return "";
}

#if defined(__CUDACC__)

namespace detail {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that is loaded, so that nothing is linked with libcuda: a machine without a driver can import us.
inline EncodeTiled encode_tiled() {
    static EncodeTiled found = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                            cudaEnableDefault, &result);
#else
        cudaError_t code = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
        if (code != cudaSuccess || result != cudaDriverEntryPointSuccess || function == nullptr) {
            cudaGetLastError();  // so that it is not reported again, to somebody else
            throw std::runtime_error("CUDA: no cuTensorMapEncodeTiled in the driver, it must be of CUDA 12 or later: " +
                                     std::string(cudaGetErrorName(code)) + ", query result " +
                                     std::to_string(static_cast<int>(result)));
        }
        return reinterpret_cast<EncodeTiled>(function);
    }();
    return found;
}

inline CUtensorMapDataType data_type(Dtype d) {
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

}  // namespace detail

#endif  // __CUDACC__

inline TensorMap make_tensor_map(const TensorBlock& t, const void* base) {
    auto what = [&] {
        std::string text = "a tensor map of " + std::to_string(t.rank) + " dimensions";
        for (int i = 0; i < t.rank && i < 5; ++i)
            text += (i ? ", " : ": ") + std::to_string(t.sizes[i]) + " (stride " + std::to_string(t.strides[i]) +
                    ", block " + std::to_string(t.block[i]) + ")";
        return text;
    };
    if (std::string why = refused(t, base); !why.empty()) throw std::runtime_error(what() + " is refused: " + why);
    TensorMap map{};
#if defined(__CUDACC__)
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
    CUresult code = detail::encode_tiled()(
        &map, detail::data_type(t.dtype), static_cast<cuuint32_t>(t.rank), const_cast<void*>(base), sizes, strides,
        block, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // "none": zeros
    if (code != CUDA_SUCCESS)
        throw std::runtime_error("CUDA: " + what() + " is refused by the driver: CUresult " +
                                 std::to_string(static_cast<int>(code)));
#else
    map.base = static_cast<const char*>(base);
    map.dtype = t.dtype;
    map.rank = t.rank;
    map.swizzle = t.swizzle;
    for (int i = 0; i < 5; ++i) {
        bool real = i < t.rank;
        map.sizes[i] = real ? t.sizes[i] : 1;
        map.strides[i] = real ? t.strides[i] : 0;
        map.block[i] = real ? t.block[i] : 1;
    }
#endif
    return map;
}

}  // namespace vk
