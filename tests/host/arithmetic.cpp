// What the extension computes without data, for tests/test_csrc.py: offsets, plans, tensor maps. Problems and tensors are
// read by the extension's own bindings, so these are here a second time, under another name and never initialised.
#undef VITKERNELS_MODULE
#define VITKERNELS_MODULE _bindings
#include "bindings.cpp"

#include "forward/sm90.cuh"

using namespace py::literals;
using Numbers = std::array<int64_t, 5>;

static Gpu gpu_of(const py::tuple& t) { return {t[0].cast<int>(), t[1].cast<int>(), t[2].cast<int>()}; }

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

// As launch_hopper_road chooses
static TensorBlock image_block_of(const Problem& p, const Forward& f, int& box, bool& direct) {
    direct = p.image == p.compute && !scaling_of(p).normalised;
    box = direct                    ? PatchesOf<half, true>::BOX
          : p.image == Dtype::u8    ? PatchesOf<uint8_t, false>::BOX
          : p.image == Dtype::f32   ? PatchesOf<float, false>::BOX
                                    : PatchesOf<half, false>::BOX;
    return image_block(p, make_walk(p, p.strides), f.block, f.stage_rows, box, direct ? 32 : 0);
}

static py::dict dict_of(const Problem& p, const Gpu& gpu, const Forward& f, const Tensor& images, const Tensor& weight) {
    py::dict d;
    d["road"] = f.road == Road::gather ? "gather" : f.road == Road::copy ? "copy" : f.road == Road::rows ? "rows" : "patches";
    d["how"] = how(p, f), d["cost"] = cost_of(f, gpu);
    d["hopper"] = f.hopper, d["BM"] = f.tile.BM, d["BN"] = f.tile.BN, d["threads"] = f.tile.threads;
#define VK_FIGURE(name) d[#name] = f.name
    VK_FIGURE(step_k), VK_FIGURE(steps), VK_FIGURE(stages), VK_FIGURE(chunk), VK_FIGURE(stage_rows);
    VK_FIGURE(slot_bytes), VK_FIGURE(segment_bytes), VK_FIGURE(segments), VK_FIGURE(a_bytes), VK_FIGURE(b_pitch);
    VK_FIGURE(stage_bytes), VK_FIGURE(table_bytes), VK_FIGURE(shared_bytes), VK_FIGURE(pack), VK_FIGURE(weight_row);
    VK_FIGURE(weight_chunk), VK_FIGURE(tiles_n), VK_FIGURE(tiles), VK_FIGURE(blocks), VK_FIGURE(scratch_bytes);
#undef VK_FIGURE
    d["block"] = list_of(f.block, 3);
    if (f.hopper) {
        // A packed weight lies where PyTorch's allocator puts scratch.
        d["weight_map"] = dict_of(weight_block(p, f), f.pack ? pointer(1 << 20) : weight.data);
        if (f.road == Road::patches) {
            int box;
            bool direct;
            d["image_map"] = dict_of(image_block_of(p, f, box, direct), images.data);
            d["box"] = box, d["direct"] = direct;
        }
    }
    return d;
}

static py::dict dict_of(const Problem& p, const Backward& b) {
    using namespace backward;
    py::dict d;
    d["scratch_bytes"] = b.scratch_bytes;
    py::list regions;  // name, where it begins, its elements' bytes, its elements
    auto region = [&](const char* name, int64_t at, int size, int64_t count) {
        regions.append(py::make_tuple(name, at, size, count));
    };
    if (b.has_weight) {
        const WeightPlan& w = b.weight;
        Shape s = weight_shape(product_of(p), w.hopper ? 0 : w.size);
        if (w.hopper) s = {HOPPER_CHANNELS[w.size], HOPPER_ROWS * HOPPER_PIXELS, HOPPER_STEP, 0, 0, 1};
        d["weight"] = py::dict("hopper"_a = w.hopper, "BM"_a = s.BM, "BN"_a = s.BN, "BK"_a = s.BK,
                               "resident"_a = s.resident, "splits"_a = w.splits, "chunk"_a = w.chunk,
                               "tiles"_a = w.tiles, "tiles_k"_a = w.tiles_k, "blocks"_a = w.blocks,
                               "shared_bytes"_a = w.shared_bytes, "block"_a = list_of(w.block, 3));
        region("weight_parts", b.weight_parts, sum_bytes(p), w.splits * p.D * p.K);
    }
    if (b.has_sums) {
        const SumsPlan& s = b.sums;
        d["sums"] = py::dict("first"_a = s.first, "last"_a = s.last, "stored"_a = s.stored, "splits"_a = s.splits,
                             "chunk"_a = s.chunk, "lanes"_a = s.lanes, "blocks"_a = s.blocks, "tiles_d"_a = s.tiles_d,
                             "table_rows"_a = s.table_rows);
        region("table_parts", b.table_parts, sum_bytes(p), s.splits * s.table_rows * p.D);
        if (s.last > p.T) region("bias_parts", b.bias_parts, sum_bytes(p), s.splits * s.blocks * p.D);
    }
    if (b.has_images) {
        const ImagesPlan& i = b.images;
        py::list classes;
        for (int n = 0; n < i.count; ++n) {
            const PixelClass& c = i.classes[n];
            classes.append(py::dict("first"_a = list_of(c.first, 3), "size"_a = list_of(c.size, 3),
                                    "windows"_a = list_of(c.windows, 3), "columns"_a = c.columns, "pitch"_a = c.pitch,
                                    "packed"_a = c.packed, "tiles"_a = c.tiles, "first_block"_a = c.first_block));
        }
        Shape s = images_shape(product_of(p));
        d["images"] = py::dict("cells"_a = list_of(i.cells, 3), "M"_a = i.M, "tiles_m"_a = i.tiles_m,
                               "blocks"_a = i.blocks, "packed"_a = i.packed, "shared_bytes"_a = i.shared_bytes,
                               "classes"_a = classes, "BM"_a = s.BM, "BN"_a = s.BN);
        region("packed", b.packed, size_of(p.compute), i.packed);
    }
    if (b.indexed) region("heads", b.heads, 4, p.B * p.N), region("nexts", b.nexts, 4, p.B * p.rows);
    d["regions"] = regions;
    return d;
}

PYBIND11_MODULE(_host, m) {
    m.def("why_not", [](const py::dict& p, const py::tuple& gpu) { return why_not(problem_of(p), gpu_of(gpu)); });
    m.def("backward_refused", [](const py::dict& p) { return backward_refused(problem_of(p)); });

    py::class_<Walk>(m, "Walk", py::module_local())
        .def(py::init([](const py::dict& d) {
            Problem p = problem_of(d);
            return make_walk(p, p.strides);
        }))
        .def_readonly("channels_last", &Walk::channels_last)
        .def("corner", [](const Walk& w, int64_t b, int64_t n) {
            Corner c = corner_of(w, b, n);
            return py::make_tuple(c.offset, c.f, c.h, c.w);
        })
        .def("element", [](const Walk& w, int k) {
            Element e = element_of(w, k);
            return py::make_tuple(e.offset, e.t, e.y, e.x);
        })
        .def("channel", [](const Walk& w, int k) { return channel_of(w, k); })
        .def("inside", [](const Walk& w, int64_t b, int64_t n, int k) {
            return is_inside(w, corner_of(w, b, n), element_of(w, k));
        })
        .def("weight_offset", [](const Walk& w, int k, const Numbers& numbers) {
            int64_t strides[5];
            std::copy(numbers.begin(), numbers.end(), strides);
            return weight_offset(w, k, strides);
        });
    m.def("divided", [](int64_t divisor, uint32_t n) {
        Divisor by(divisor);
        return py::make_tuple(by.div(n), by.mod(n));
    });

    m.def("forward_candidates",
          [](const py::dict& d, const py::tuple& g, const py::object& images, const py::object& weight) {
              Problem p = problem_of(d);
              Gpu gpu = gpu_of(g);
              py::list plans;
              for (const Forward& f : forward_candidates(p, gpu, tensor_of(images), tensor_of(weight)))
                  plans.append(dict_of(p, gpu, f, tensor_of(images), tensor_of(weight)));
              return plans;
          });
    m.def("plan_forward", [](const py::dict& d, const py::tuple& g, const py::object& images, const py::object& weight) {
        Problem p = problem_of(d);
        Gpu gpu = gpu_of(g);
        Forward f = plan_forward(p, gpu, tensor_of(images), tensor_of(weight));
        return dict_of(p, gpu, f, tensor_of(images), tensor_of(weight));
    });
    m.def("choose_block", [](const py::dict& d, int BM) {
        int block[3];
        choose_block(problem_of(d), BM, block);
        return list_of(block, 3);
    });
    // Tensors in BackwardTensors' order
    m.def("plan_backward", [](const py::dict& d, const py::tuple& g, const py::tuple& t) {
        Problem p = problem_of(d);
        BackwardTensors tensors{tensor_of(t[0]), tensor_of(t[1]), tensor_of(t[2]), tensor_of(t[3]), tensor_of(t[4]),
                                tensor_of(t[5]), tensor_of(t[6]), tensor_of(t[7]), tensor_of(t[8]), tensor_of(t[9]),
                                nullptr};
        return dict_of(p, plan_backward(p, gpu_of(g), tensors));
    });
}
