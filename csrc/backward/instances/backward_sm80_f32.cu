// The backward's products of float, as it is and rounded to TF32.
#include "backward/images.cuh"
#include "backward/weight_sm80.cuh"

namespace vk::backward {
VK_PRODUCTS(, float)
VK_PRODUCTS(, tf32)
}
