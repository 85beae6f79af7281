// launch of csrc/launch.h, for a CPU.
#pragma once

#include <string>

#include "host/emulator.h"

namespace vk {

using Stream = void*;

struct OnDevice {  // there is one
    explicit OnDevice(int) {}
};

template <class Arguments>
void launch(void (*kernel)(Arguments), int64_t blocks, int threads, int shared_bytes, Stream,
            const Arguments& arguments, const std::string& what, int cluster = 1, Early early = {}) {
    host::run(
        [](const void* kernel, const void* arguments) {
            (*static_cast<void (*const*)(Arguments)>(kernel))(*static_cast<const Arguments*>(arguments));
        },
        &kernel, &arguments, blocks, threads, shared_bytes, cluster, what, const_cast<void*>(early.data), early.bytes);
}

}  // namespace vk
