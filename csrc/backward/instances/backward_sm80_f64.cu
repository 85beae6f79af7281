// The backward's products of double.
#include "backward/images.cuh"
#include "backward/weight_sm80.cuh"

namespace vk::backward {

template void launch_weight<double>(const WeightArguments&, const WeightPlan&, Stream);
template void launch_images<double>(const ImagesArguments&, const ImagesPlan&, Stream);

}  // namespace vk::backward
