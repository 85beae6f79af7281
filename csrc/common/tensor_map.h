// Tensors as the copy engine of sm_90 takes them: what a map describes, why the driver would refuse it, and the map.
#pragma once

#include <stdexcept>
#include <string>

#include "common/errors.h"
#include "common/ptx.cuh"
#include "common/problem.h"

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

constexpr int SUCCESS = 0, INVALID_VALUE = 1;  // CUresults

// The map of a tensor as a driver makes it (driver.h).
template <class Driver>
TensorMap make_tensor_map(const TensorBlock& t, const void* base, Driver&& driver) {
    auto what = [&] {
        std::string text = "a tensor map of " + std::to_string(t.rank) + " dimensions";
        for (int i = 0; i < t.rank && i < 5; ++i)
            text += (i ? ", " : ": ") + std::to_string(t.sizes[i]) + " (stride " + std::to_string(t.strides[i]) +
                    ", block " + std::to_string(t.block[i]) + ")";
        return text;
    };
    if (std::string why = refused(t, base); !why.empty()) throw std::runtime_error(what() + " is refused: " + why);
    // Until its first call of the runtime that needs one a thread has no context, and the driver encodes nothing in it.
    if (!driver.has_context()) driver.bind_context();
    TensorMap map{};
    int result = driver.encode(map, t, base);
    if (result == SUCCESS) return map;
    std::string text = "CUDA: " + driver.name_of(result) + ": " + what();
    if (result == INVALID_VALUE) throw Refused(text + " is refused by the driver");
    throw std::runtime_error(text);
}

}  // namespace vk
