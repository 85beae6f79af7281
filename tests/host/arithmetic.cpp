// What the extension computes without data, for tests/csrc/test_arithmetic.py: offsets, tensor maps. Problems and tensors are
// read by the extension's own bindings, so these are here a second time, under another name and never initialised.
#undef VITKERNELS_MODULE
#define VITKERNELS_MODULE _bindings
#include "bindings.cpp"

#include "backward/images_sm90.cuh"
#include "forward/sm90.cuh"

using Numbers = std::array<int64_t, 5>;

template <class T>
static py::list list_of(const T* values, int count) {
    py::list list;
    for (int i = 0; i < count; ++i) list.append(values[i]);
    return list;
}

static py::dict dict_of(const TensorBlock& t, const void* base) {
    py::dict d;
    d["itemsize"] = size_of(t.dtype);
    d["sizes"] = list_of(t.sizes, t.rank), d["strides"] = list_of(t.strides, t.rank);
    d["block"] = list_of(t.block, t.rank), d["swizzle"] = t.swizzle, d["refused"] = refused(t, base);
    return d;
}

// As launch_sm90 chooses
static py::dict image_map_of(const Problem& p, const ForwardPlan& f, const Tensor& images, int place) {
    bool direct = p.image == p.compute && p.compute != Dtype::f32 && !p.normalised;
    int box = direct                  ? PatchesOf<half, true, false>::BOX
              : p.image == Dtype::u8  ? PatchesOf<uint8_t, false, false>::BOX
              : p.image == Dtype::f32 ? PatchesOf<float, false, false>::BOX
                                      : PatchesOf<half, false, false>::BOX;
    int rows = f.group == 1 ? f.stage_rows : 1, swizzle = direct ? 32 : 0;
    py::dict d = dict_of(image_block(p, layout_of(p, p.strides), f.block, rows, box, swizzle, f.group, place),
                         images.data);
    d["box"] = box;
    return d;
}

PYBIND11_MODULE(_host, m) {
    py::class_<PatchLayout>(m, "PatchLayout", py::module_local())
        .def(py::init([](const py::dict& d) {
            Problem p = problem_of(d);
            return layout_of(p, p.strides);
        }))
        .def_readonly("channels_last", &PatchLayout::channels_last)
        .def("corner", [](const PatchLayout& layout, int64_t b, int64_t n) {
            Corner c = corner_of(layout, b, n);
            return py::make_tuple(c.offset, c.f, c.h, c.w);
        })
        .def("element", [](const PatchLayout& layout, int k) {
            Element e = element_of(layout, k);
            return py::make_tuple(e.offset, e.t, e.y, e.x);
        })
        .def("channel", [](const PatchLayout& layout, int k) { return channel_of(layout, k); })
        .def("inside", [](const PatchLayout& layout, int64_t b, int64_t n, int k) {
            return is_inside(layout, corner_of(layout, b, n), element_of(layout, k));
        })
        .def("weight_offset", [](const PatchLayout& layout, int k, const Numbers& numbers) {
            int64_t strides[5];
            std::copy(numbers.begin(), numbers.end(), strides);
            return weight_offset(layout, k, strides);
        });
    m.def("divided", [](int64_t divisor, uint32_t n) {
        Divisor by(divisor);
        return py::make_tuple(by.div(n), by.mod(n));
    });

    m.def("weight_map", [](const py::dict& p, const py::dict& plan, uintptr_t weight) {
        return dict_of(weight_block(problem_of(p), forward_plan_of(plan)), pointer(weight));
    });
    m.def("token_map", [](const py::dict& p, const py::dict& plan, uintptr_t first) {
        ForwardPlan f = forward_plan_of(plan);
        return dict_of(token_block(problem_of(p), f.block, f.group), pointer(first));
    });
    m.def("maps_of_images", [](const py::dict& p, const py::dict& plan, const py::object& layout, int place) {
        Problem of = problem_of(p);
        backward::WgmmaImagesPlan f = wgmma_images_plan_of(plan);
        Tensor images = layout_of(layout);
        const int64_t grid[2] = {of.G[0] * of.G[1], of.G[2]}, rows = of.T + of.rows;
        Tensor grad{nullptr, of.compute, {rows * of.D, of.D, 1}};
        void* somewhere = pointer(uintptr_t{1} << 20);
        return py::make_tuple(
            dict_of(backward::pixel_block(of, layout_of(of, images.strides), f.block, f.group, place), somewhere),
            dict_of(backward::grad_block(of, grad, f.block, f.group, grid), somewhere));
    });
    m.def("image_map", [](const py::dict& p, const py::dict& plan, uintptr_t address, const py::object& layout,
                         int place) {
        Tensor images = layout_of(layout);
        images.data = pointer(address);
        return image_map_of(problem_of(p), forward_plan_of(plan), images, place);
    });
}
