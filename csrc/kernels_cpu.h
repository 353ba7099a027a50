// The CPU kernels, one copy per instruction set: namespaces psf::baseline, psf::avx2 and psf::avx512.
#pragma once

#include <cstdint>

#define PSF_KERNELS_CPU(isa)                                                                        \
  namespace psf::isa {                                                                              \
  float upsampled_square_sum(const float* map, int64_t height, int64_t width, const float* rows,    \
                             const float* row_pairs, const float* columns, const float* column_pairs); \
  }

PSF_KERNELS_CPU(baseline)
#if defined(__x86_64__)
PSF_KERNELS_CPU(avx2)
PSF_KERNELS_CPU(avx512)
#endif
