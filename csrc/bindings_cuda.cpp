// The Python module nar_kernels._cuda: addresses and a stream in, kernels below, no torch.
#include "bindings.h"
#include "corrupt/corrupt_cuda.h"
#include "unmask/unmask_cuda.h"

namespace py = pybind11;

namespace {

void corrupt(const py::tuple& arguments, const py::tuple& outputs, int token_type,
             int64_t num_corpus_tokens, int device, int64_t stream) {
  const nar::CorruptArgs args =
      nar::unpack_corrupt(arguments, token_type, num_corpus_tokens).with(outputs);
  const py::gil_scoped_release release;
  nar::corrupt_cuda(args, device, nar::pointer<CUstream_st>(stream));
}

void unmask(const py::tuple& arguments, const py::tuple& outputs, int logit_type,
            int64_t more_forbidden, int device, int64_t stream) {
  std::vector<int64_t> forbidden;
  const nar::UnmaskArgs args = nar::unpack_unmask(arguments, outputs, &forbidden);
  const py::gil_scoped_release release;
  nar::unmask_cuda(args, static_cast<nar::GpuLogitType>(logit_type),
                   nar::pointer<const int64_t>(more_forbidden), device,
                   nar::pointer<CUstream_st>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.attr("architectures") = NAR_CUDA_ARCHS;
  m.def("corrupt", &corrupt);
  m.def("workspace_size", &nar::workspace_size);
  m.def("unmask", &unmask);
  m.attr("forbidden_arguments") = nar::kForbiddenArguments;
}
