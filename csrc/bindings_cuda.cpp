// The Python module nar_kernels._cuda: raw addresses and a stream in, kernels below, no torch.
#include "bindings.h"
#include "corrupt_cuda.h"

namespace py = pybind11;

namespace {

void corrupt(std::string_view packed, int device, int64_t stream) {
  const nar::CorruptArgs args = nar::unpack_corrupt(packed);
  const py::gil_scoped_release release;
  nar::corrupt_cuda(args, device, nar::pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("architectures") = NAR_CUDA_ARCHS;
  m.def("corrupt", &corrupt);
  m.def("workspace_size", &nar::workspace_size);
}
