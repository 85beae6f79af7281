// The extension's Python module: raw pointers, sizes, strides and a stream in. No PyTorch here: vitkernels/backends/cuda
// allocates everything, and one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backward/backward.h"
#include "common/errors.h"
#include "forward/forward.h"

namespace py = pybind11;
using namespace vk;

// Of which nothing but the tensors' addresses is missing: made once for a problem, launched at every call.
struct PreparedForward {
    Problem problem;
    ForwardPlan plan;
    ForwardTensors tensors;
};

struct PreparedBackward {
    Problem problem;
    backward::BackwardPlan plan;
    BackwardTensors tensors;
};

// None, or (dtype, *strides) with the dtype's place in problem.h's Dtype
static Tensor layout_of(const py::object& from) {
    Tensor t{};
    if (from.is_none()) return t;
    auto values = from.cast<py::tuple>();
    t.dtype = static_cast<Dtype>(values[0].cast<int>());
    for (size_t i = 1; i < values.size() && i < 6; ++i) t.strides[i - 1] = values[i].cast<int64_t>();
    return t;
}

template <class T, size_t COUNT>
static void read(T (&to)[COUNT], const py::dict& from, const char* name) {
    auto values = from[name].cast<py::tuple>();
    for (size_t i = 0; i < COUNT; ++i) to[i] = values[i].cast<T>();
}

template <class T>
static void read(T& to, const py::dict& from, const char* name) {
    if constexpr (std::is_enum_v<T>)
        to = static_cast<T>(from[name].cast<int>());
    else
        to = from[name].cast<T>();
}

#define VK_READ(field) read(to.field, from, #field)

static Problem problem_of(const py::dict& from) {
    Problem to{};
    VK_READ(B), VK_READ(C), VK_READ(F), VK_READ(H), VK_READ(W), VK_READ(P), VK_READ(S), VK_READ(pad), VK_READ(G);
    VK_READ(D), VK_READ(T), VK_READ(N), VK_READ(rows), VK_READ(K), VK_READ(keep), VK_READ(pos_rows), VK_READ(strides);
    VK_READ(normalised), VK_READ(scale), VK_READ(tf32), VK_READ(device), VK_READ(text);
    VK_READ(image), VK_READ(weight), VK_READ(compute), VK_READ(out);
    return to;
}

// Plans, as forward_plan.py and backward_plan.py name their fields

static ForwardPlan forward_plan_of(const py::dict& from) {
    ForwardPlan to{};
    VK_READ(loader), VK_READ(wgmma), VK_READ(BM), VK_READ(BN), VK_READ(step_k), VK_READ(steps), VK_READ(lag), VK_READ(stages);
    VK_READ(chunk), VK_READ(stage_rows), VK_READ(slot_bytes), VK_READ(segment_bytes), VK_READ(segments), VK_READ(block), VK_READ(group);
    VK_READ(cluster), VK_READ(splits), VK_READ(a_bytes), VK_READ(b_pitch), VK_READ(stage_bytes), VK_READ(table_bytes), VK_READ(shared_bytes);
    VK_READ(pack), VK_READ(weight_row), VK_READ(weight_chunk), VK_READ(tf32_terms), VK_READ(tiles_n), VK_READ(tiles), VK_READ(blocks);
    VK_READ(how);
    return to;
}

static void read(backward::LoadedBy& to, const py::dict& from, const char* name) {
    auto operand = from[name].cast<py::tuple>();
    to = {static_cast<backward::LoaderKind>(operand[0].cast<int>()), operand[1].cast<int>()};
}

static backward::WeightPlan weight_plan_of(const py::dict& from) {
    backward::WeightPlan to{};
    read(to.tile.BM, from, "BM"), read(to.tile.BN, from, "BN"), read(to.tile.BK, from, "BK");
    VK_READ(wgmma), VK_READ(splits), VK_READ(chunk), VK_READ(tiles_k), VK_READ(tiles), VK_READ(pixels), VK_READ(grad);
    VK_READ(shared_bytes), VK_READ(block), VK_READ(group), VK_READ(stages), VK_READ(blocks), VK_READ(pair);
    return to;
}

static backward::SumsPlan sums_plan_of(const py::dict& from) {
    backward::SumsPlan to{};
    VK_READ(first), VK_READ(last), VK_READ(stored), VK_READ(table_rows), VK_READ(splits), VK_READ(chunk);
    VK_READ(lanes), VK_READ(blocks), VK_READ(tiles_d);
    return to;
}

static backward::PixelClass pixel_class_of(const py::dict& from) {
    backward::PixelClass to{};
    VK_READ(first), VK_READ(size), VK_READ(windows), VK_READ(columns), VK_READ(pitch), VK_READ(all_windows);
    VK_READ(packed), VK_READ(tiles), VK_READ(first_block);
    for (int i = 0; i < 3; ++i) {
        if (to.size[i] > 0) to.by_size[i] = Divisor(to.size[i]);
        if (to.windows[i] > 0) to.by_windows[i] = Divisor(to.windows[i]);
    }
    return to;
}

static backward::ImagesPlan images_plan_of(const py::dict& from) {
    backward::ImagesPlan to{};
    for (const auto& of_class : from["classes"].cast<py::tuple>())
        to.classes[to.count++] = pixel_class_of(of_class.cast<py::dict>());
    VK_READ(cells), VK_READ(M), VK_READ(blocks), VK_READ(packed), VK_READ(grad), VK_READ(shared_bytes);
    return to;
}

static backward::WgmmaImagesPlan wgmma_images_plan_of(const py::dict& from) {
    backward::WgmmaImagesPlan to{};
    VK_READ(BN), VK_READ(block), VK_READ(group), VK_READ(stages), VK_READ(shared_bytes), VK_READ(tiles_k);
    VK_READ(tiles), VK_READ(blocks), VK_READ(weight_row), VK_READ(pair);
    return to;
}

static backward::BackwardPlan backward_plan_of(const py::dict& from) {
    backward::BackwardPlan to{};
    if ((to.has_weight = !from["weight"].is_none())) to.weight = weight_plan_of(from["weight"]);
    if ((to.has_sums = !from["sums"].is_none())) to.sums = sums_plan_of(from["sums"]);
    if ((to.has_images = !from["images"].is_none())) to.images = images_plan_of(from["images"]);
    if ((to.has_wgmma_images = !from["wgmma_images"].is_none()))
        to.wgmma_images = wgmma_images_plan_of(from["wgmma_images"]);
    VK_READ(indexed), VK_READ(piece), VK_READ(copy_row), VK_READ(weight_parts), VK_READ(table_parts);
    VK_READ(bias_parts), VK_READ(copies), VK_READ(packed), VK_READ(heads), VK_READ(nexts);
    return to;
}

static void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

PYBIND11_MODULE(VITKERNELS_MODULE, m) {
    m.attr("device_type") = device_type();
    py::register_local_exception<Refused>(m, "Refused", PyExc_RuntimeError);

    py::class_<Problem>(m, "Problem", py::module_local())
        .def(py::init(&problem_of))
        .def_readonly("normalised", &Problem::normalised);

    py::class_<ForwardPlan>(m, "ForwardPlan", py::module_local()).def(py::init(&forward_plan_of));
    py::class_<PreparedForward>(m, "Forward", py::module_local())
        .def(py::init([](const Problem& p, const ForwardPlan& plan, const py::tuple& t) {
            ForwardTensors tensors{layout_of(t[0]), layout_of(t[1]), layout_of(t[2]), layout_of(t[3]), layout_of(t[4]),
                                   layout_of(t[5]), layout_of(t[6]), layout_of(t[7]), nullptr};
            return PreparedForward{p, plan, tensors};
        }))
        .def("__call__", [](const PreparedForward& f, uintptr_t images, uintptr_t weight, uintptr_t bias, uintptr_t pos,
                            uintptr_t prefix, uintptr_t keep, uintptr_t centred, uintptr_t out, uintptr_t scratch,
                            uintptr_t stream) {
            ForwardTensors t = f.tensors;
            t.images.data = pointer(images), t.weight.data = pointer(weight), t.bias.data = pointer(bias);
            t.pos.data = pointer(pos), t.prefix.data = pointer(prefix), t.keep.data = pointer(keep);
            t.centred.data = pointer(centred), t.out.data = pointer(out), t.scratch = pointer(scratch);
            run_forward(f.problem, f.plan, t, pointer(stream));
        });

    py::class_<backward::BackwardPlan>(m, "BackwardPlan", py::module_local()).def(py::init(&backward_plan_of));
    py::class_<PreparedBackward>(m, "Backward", py::module_local())
        .def(py::init([](const Problem& p, const backward::BackwardPlan& plan, const py::tuple& t) {
            BackwardTensors tensors{layout_of(t[0]), layout_of(t[1]), layout_of(t[2]), layout_of(t[3]), layout_of(t[4]),
                                    layout_of(t[5]), layout_of(t[6]), layout_of(t[7]), layout_of(t[8]), layout_of(t[9]),
                                    nullptr};
            return PreparedBackward{p, plan, tensors};
        }))
        .def("__call__", [](const PreparedBackward& b, uintptr_t grad, uintptr_t images, uintptr_t weight,
                            uintptr_t keep, uintptr_t centred, uintptr_t d_images, uintptr_t d_weight, uintptr_t d_bias,
                            uintptr_t d_pos, uintptr_t d_prefix, uintptr_t scratch, uintptr_t stream) {
            BackwardTensors t = b.tensors;
            t.grad.data = pointer(grad), t.images.data = pointer(images), t.weight.data = pointer(weight);
            t.keep.data = pointer(keep), t.centred.data = pointer(centred), t.d_images.data = pointer(d_images);
            t.d_weight.data = pointer(d_weight), t.d_bias.data = pointer(d_bias), t.d_pos.data = pointer(d_pos);
            t.d_prefix.data = pointer(d_prefix), t.scratch = pointer(scratch);
            run_backward(b.problem, b.plan, t, pointer(stream));
        });
}
