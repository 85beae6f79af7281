// The backward's products of double.
#include "backward_images.cuh"
#include "backward_weight.cuh"

namespace vk::backward {

template void launch_weight<double>(const WeightArguments&, const WeightPlan&, Stream);
template void launch_images<double>(const ImagesArguments&, const ImagesPlan&, Stream);

}  // namespace vk::backward
