// The backward's products of half.
#include "backward_images.cuh"
#include "backward_weight.cuh"

namespace vk::backward {

template void launch_weight<half>(const WeightArguments&, const WeightPlan&, Stream);
template void launch_images<half>(const ImagesArguments&, const ImagesPlan&, Stream);

}  // namespace vk::backward
