// The backward's products of float, as it is and rounded to TF32.
#include "backward/images.cuh"
#include "backward/weight_sm80.cuh"

namespace vk::backward {

template void launch_weight<float>(const WeightArguments&, const WeightPlan&, Stream);
template void launch_weight<tf32>(const WeightArguments&, const WeightPlan&, Stream);
template void launch_images<float>(const ImagesArguments&, const ImagesPlan&, Stream);
template void launch_images<tf32>(const ImagesArguments&, const ImagesPlan&, Stream);

}  // namespace vk::backward
