// The backward's products of half.
#include "backward/images.cuh"
#include "backward/weight_sm80.cuh"

namespace vk::backward {
VK_PRODUCTS(, half)
}
