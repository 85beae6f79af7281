// What goes wrong, as Python sees it.
#pragma once

#include <stdexcept>
#include <string>

namespace vk {

// The driver takes no map of this tensor: another kernel can still be taken. What else fails is a std::runtime_error.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A tile that no kernel was made for: a mistake of the plan.
[[noreturn]] inline void no_kernel(int BM, int BN) {
    throw std::logic_error("there is no kernel of tiles of " + std::to_string(BM) + "×" + std::to_string(BN));
}

// act(); what it throws is thrown on, with where() behind its text.
template <class Act, class Where>
void locate_errors(const Act& act, const Where& where) {
    auto located = [&](const std::exception& error) { return std::string(error.what()) + ": " + where(); };
    try {
        act();
    } catch (const Refused& error) {
        throw Refused(located(error));
    } catch (const std::runtime_error& error) {
        throw std::runtime_error(located(error));
    }
}

}  // namespace vk
