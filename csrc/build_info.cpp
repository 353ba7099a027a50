// A Python module without tensors that tells how the CPU library is compiled, for bug reports.
// The build passes what it knows as strings: PSF_FLAGS, PSF_INSTRUCTION_SETS, PSF_CPU_LIBRARY.

#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "isa.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

py::list words(const std::string& text) {
  py::list result;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) {
    result.append(word);
  }
  return result;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = kCompiler;
  info["cplusplus"] = __cplusplus;
  info["flags"] = PSF_FLAGS;
  info["cpu_library"] = PSF_CPU_LIBRARY;
  info["instruction_sets"] = words(PSF_INSTRUCTION_SETS);
  info["supported"] = psf::isa_name(psf::isa_supported());
  info["in_use"] = psf::isa_name(psf::isa_in_use());
  return info;
}

}  // namespace

PYBIND11_MODULE(pseudoseg_build_info, module) {
  module.doc() = "How the CPU library of pseudoseg_fast is compiled.";
  module.def("build_info", &build_info, "Return compiler, flags and instruction sets as a dict.");
}
