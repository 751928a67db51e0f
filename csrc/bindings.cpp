// What Python sees of the compiled code: checks, conversion and the interpreter lock, no
// arithmetic.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings_transfer.hpp"
#include "sample_triplets.hpp"

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Ids = py::array_t<std::int64_t, py::array::c_style>;
using Bytes = py::array_t<std::uint8_t, py::array::c_style>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

struct Inputs {
  gcfast::TripletAnchors anchors;
  gcfast::TripletTable table;
};

Inputs inputs(const Floats& anchors, const Ids& anchor_labels, const Ids& anchor_rows,
              const Floats& embeddings, const Ids& labels, const Ids& by_label, int threads,
              const std::optional<Bytes>& sketch = std::nullopt) {
  require(anchors.ndim() == 2 && embeddings.ndim() == 2,
          "`anchors` and `embeddings` must have shapes [B, D] and [N, D]");
  require(anchors.shape(1) == embeddings.shape(1),
          "`anchors` and `embeddings` must have the same width D");
  require(anchor_labels.ndim() == 1 && anchor_labels.shape(0) == anchors.shape(0),
          "`anchor_labels` must have shape [B]");
  require(anchor_rows.ndim() == 1 && anchor_rows.shape(0) == anchors.shape(0),
          "`anchor_rows` must have shape [B]");
  require(labels.ndim() == 1 && labels.shape(0) == embeddings.shape(0),
          "`labels` must have shape [N]");
  require(by_label.ndim() == 1 && by_label.shape(0) == labels.shape(0),
          "`by_label` must have shape [N]");
  require(!sketch || (sketch->ndim() == 2 && sketch->shape(0) == labels.shape(0) &&
                      sketch->shape(1) == gcfast::sketch_bytes(embeddings.shape(1))),
          "`sketch` must have shape [N, D + 8]");
  require(threads >= 1, "`threads` must be at least 1");
  return {{anchors.data(), anchor_labels.data(), anchor_rows.data(), anchors.shape(0)},
          {embeddings.data(), labels.data(), by_label.data(), embeddings.shape(0),
           embeddings.shape(1), sketch ? sketch->data() : nullptr}};
}

py::tuple sample_triplets(const Floats& anchors, const Ids& anchor_labels, const Ids& anchor_rows,
                          const Floats& embeddings, const Ids& labels, const Ids& by_label,
                          const std::optional<Bytes>& sketch, std::int64_t triplets, double margin,
                          std::uint64_t seed, std::int64_t first, std::int64_t tries, int threads) {
  const Inputs in =
      inputs(anchors, anchor_labels, anchor_rows, embeddings, labels, by_label, threads, sketch);
  require(triplets >= 1, "`triplets` must be at least 1");
  require(tries >= 0 && tries < std::numeric_limits<std::int32_t>::max(),
          "`tries` must be from 0 to 2^31 - 2");
  const auto B = static_cast<py::ssize_t>(in.anchors.count);
  const auto T = static_cast<py::ssize_t>(triplets);
  Ids positives({B, T}), negatives({B, T}), counts(B), hardest({B, py::ssize_t{2}});
  py::array_t<bool> exact(B);
  const gcfast::TripletOutputs out{positives.mutable_data(), negatives.mutable_data(),
                                   counts.mutable_data(), hardest.mutable_data(),
                                   exact.mutable_data()};
  {
    // The arguments hold references to the arrays for the whole call, and nothing below is
    // Python's.
    const py::gil_scoped_release unlocked;
    gcfast::sample_triplets(in.anchors, in.table, margin, {triplets, seed, first, tries}, threads,
                            out);
  }
  return py::make_tuple(positives, negatives, counts, hardest, exact);
}

py::tuple mean_cotangents(const Floats& anchors, const Ids& anchor_labels, const Ids& anchor_rows,
                          const Floats& embeddings, const Ids& labels, const Ids& by_label,
                          double margin, int threads) {
  const Inputs in =
      inputs(anchors, anchor_labels, anchor_rows, embeddings, labels, by_label, threads);
  const auto B = static_cast<py::ssize_t>(in.anchors.count);
  Floats cotangents({B, static_cast<py::ssize_t>(in.table.dim)});
  Ids counts(B), hardest({B, py::ssize_t{2}});
  float* const cotangents_data = cotangents.mutable_data();
  std::int64_t* const counts_data = counts.mutable_data();
  std::int64_t* const hardest_data = hardest.mutable_data();
  {
    // As above.
    const py::gil_scoped_release unlocked;
    gcfast::mean_cotangents(in.anchors, in.table, margin, threads, cotangents_data, counts_data,
                            hardest_data);
  }
  return py::make_tuple(cotangents, counts, hardest);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled CPU backends of gcfast; call them through gcfast.ops.";
  module.def("sample_triplets", &sample_triplets, py::arg("anchors").noconvert(),
             py::arg("anchor_labels").noconvert(), py::arg("anchor_rows").noconvert(),
             py::arg("embeddings").noconvert(), py::arg("labels").noconvert(),
             py::arg("by_label").noconvert(), py::arg("sketch").noconvert(), py::kw_only(),
             py::arg("triplets"), py::arg("margin"), py::arg("seed"), py::arg("first"),
             py::arg("tries"), py::arg("threads"),
             "(positives [B,T], negatives [B,T], counts [B], hardest [B,2], exact [B]); see "
             "gcfast.ops.sample_triplets. first = -1 draws, first >= 0 lists pairs from there on.");
  module.def("mean_cotangents", &mean_cotangents, py::arg("anchors").noconvert(),
             py::arg("anchor_labels").noconvert(), py::arg("anchor_rows").noconvert(),
             py::arg("embeddings").noconvert(), py::arg("labels").noconvert(),
             py::arg("by_label").noconvert(), py::kw_only(), py::arg("margin"), py::arg("threads"),
             "(cotangents [B,D], counts [B], hardest [B,2]); see gcfast.ops.mean_cotangents.");
  gcfast::register_transfer(module);
}
