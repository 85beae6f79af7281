// The backward's products of double.
#include "backward/images.cuh"
#include "backward/weight_sm80.cuh"

namespace vk::backward {
VK_PRODUCTS(, double)
}
