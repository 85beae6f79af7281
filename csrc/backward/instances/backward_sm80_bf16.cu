// The backward's products of bfloat16.
#include "backward/images.cuh"
#include "backward/weight_sm80.cuh"

namespace vk::backward {
VK_PRODUCTS(, bfloat16)
}
