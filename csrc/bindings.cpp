// The extension's Python module: raw pointers, sizes, strides and a stream in. No PyTorch here: vitkernels/cuda.py
// allocates everything, and one build serves every version of it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "backward/backward.h"
#include "common/errors.h"
#include "forward/forward.h"

namespace py = pybind11;
using namespace vk;

// None, or (address, dtype, *strides) with the dtype's place in problem.h's Dtype
static Tensor tensor_of(const py::object& from) {
    Tensor t{};
    if (from.is_none()) return t;
    auto values = from.cast<py::tuple>();
    t.data = reinterpret_cast<void*>(values[0].cast<uintptr_t>());
    t.dtype = static_cast<Dtype>(values[1].cast<int>());
    for (size_t i = 2; i < values.size() && i < 7; ++i) t.strides[i - 2] = values[i].cast<int64_t>();
    return t;
}

static void read(int64_t (&to)[3], const py::dict& from, const char* name) {
    auto values = from[name].cast<py::tuple>();
    for (int i = 0; i < 3; ++i) to[i] = values[i].cast<int64_t>();
}

static Problem problem_of(const py::dict& d) {
    Problem p{};
    auto number = [&](const char* name) { return d[name].cast<int64_t>(); };
    auto dtype = [&](const char* name) { return static_cast<Dtype>(d[name].cast<int>()); };
    p.B = number("B"), p.C = number("C"), p.F = number("F"), p.H = number("H"), p.W = number("W");
    read(p.P, d, "P"), read(p.S, d, "S"), read(p.pad, d, "pad"), read(p.G, d, "G");
    p.D = number("D"), p.T = number("T"), p.N = number("N"), p.rows = number("rows"), p.K = number("K");
    p.keep = d["keep"].cast<bool>();
    p.pos_rows = number("pos_rows");
    auto strides = d["strides"].cast<py::tuple>();
    for (int i = 0; i < 5; ++i) p.strides[i] = strides[i].cast<int64_t>();
    p.normalised = d["normalised"].cast<bool>();
    p.scale = d["scale"].cast<double>();
    p.image = dtype("image"), p.weight = dtype("weight"), p.compute = dtype("compute"), p.out = dtype("out");
    p.tf32 = d["tf32"].cast<bool>();
    return p;
}

static void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

PYBIND11_MODULE(VITKERNELS_MODULE, m) {
    m.attr("device_type") = device_type();
    py::register_local_exception<Refused>(m, "Refused", PyExc_RuntimeError);

    py::class_<Problem>(m, "Problem", py::module_local())
        .def(py::init(&problem_of))
        .def_property_readonly("normalised", [](const Problem& p) { return scaling_of(p).normalised; });
    py::class_<Gpu>(m, "Gpu", py::module_local()).def(py::init([](int arch, int multiprocessors, int shared_bytes) {
        return Gpu{arch, multiprocessors, shared_bytes};
    }));
    m.def("why_not", &why_not);

    py::class_<Forward>(m, "Forward", py::module_local())
        .def_readonly("scratch_bytes", &Forward::scratch_bytes);
    m.def("forward_candidates",
          [](const Problem& p, const Gpu& gpu, const py::object& images, const py::object& weight) {
              return forward_candidates(p, gpu, tensor_of(images), tensor_of(weight));
          });
    m.def("plan_forward", [](const Problem& p, const Gpu& gpu, const py::object& images, const py::object& weight) {
        return plan_forward(p, gpu, tensor_of(images), tensor_of(weight));
    });
    m.def("how", &how);
    m.def("forward", [](const Problem& p, const Forward& plan, const py::object& images, const py::object& weight,
                        const py::object& bias, const py::object& pos, const py::object& prefix, const py::object& keep,
                        const py::object& centred, const py::object& out, uintptr_t scratch, uintptr_t stream) {
        ForwardTensors t{tensor_of(images), tensor_of(weight), tensor_of(bias), tensor_of(pos), tensor_of(prefix),
                         tensor_of(keep), tensor_of(centred), tensor_of(out), pointer(scratch)};
        run_forward(p, plan, t, pointer(stream));
    });

    py::class_<Backward>(m, "Backward", py::module_local())
        .def_readonly("scratch_bytes", &Backward::scratch_bytes)
        .def_property_readonly("hopper", [](const Backward& b) { return b.weight.hopper; });
    m.def("backward_refused", &backward_refused);
    m.def("no_hopper_weight", [](const Problem& p, const Gpu& gpu, const py::object& images, const py::object& grad) {
        return backward::no_hopper_weight(p, gpu, tensor_of(images), tensor_of(grad));
    });
    auto tensors = [](const py::tuple& t, uintptr_t scratch) {
        return BackwardTensors{tensor_of(t[0]), tensor_of(t[1]), tensor_of(t[2]), tensor_of(t[3]), tensor_of(t[4]),
                               tensor_of(t[5]), tensor_of(t[6]), tensor_of(t[7]), tensor_of(t[8]), tensor_of(t[9]),
                               pointer(scratch)};
    };
    // Tensors in BackwardTensors' order
    m.def("plan_backward", [tensors](const Problem& p, const Gpu& gpu, const py::tuple& t) {
        return plan_backward(p, gpu, tensors(t, 0));
    });
    m.def("backward", [tensors](const Problem& p, const Backward& plan, const py::tuple& t, uintptr_t scratch,
                                uintptr_t stream) {
        run_backward(p, plan, tensors(t, scratch), pointer(stream));
    });
}
