// The backward's products of bfloat16.
#include "backward/images.cuh"
#include "backward/weight_sm80.cuh"

namespace vk::backward {

template void launch_weight<bfloat16>(const WeightArguments&, const WeightPlan&, Stream);
template void launch_images<bfloat16>(const ImagesArguments&, const ImagesPlan&, Stream);

}  // namespace vk::backward
