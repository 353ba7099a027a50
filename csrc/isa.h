// Which instruction set the kernels of this process use, decided once from the processor.
//
// Include this only from sources compiled for the baseline: its code runs before anything is known.
#pragma once

#include <cstdlib>
#include <string_view>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace psf {

enum class Isa { baseline, avx2, avx512 };

constexpr const char* isa_name(Isa isa) {
  return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline";
}

// The newest instruction set that both the processor and the operating system support.
inline Isa isa_supported() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Isa::baseline;
  }
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
  return Isa::avx2;
#else
  return Isa::baseline;
#endif
}

// The instruction set to use: the supported one, or an older one that PSEUDOSEG_ISA names.
inline Isa isa_in_use() {
  static const Isa chosen = [] {
    const Isa best = isa_supported();
    const char* text = std::getenv("PSEUDOSEG_ISA");
    const std::string_view wanted = text ? text : "";
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (wanted == isa_name(isa) && isa < best) {
        return isa;
      }
    }
    return best;
  }();
  return chosen;
}

}  // namespace psf
