// The backward's products of half.
#include "backward/images.cuh"
#include "backward/weight_sm80.cuh"

namespace vk::backward {

template void launch_weight<half>(const WeightArguments&, const WeightPlan&, Stream);
template void launch_images<half>(const ImagesArguments&, const ImagesPlan&, Stream);

}  // namespace vk::backward
