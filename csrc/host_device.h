// Marks functions that the CPU kernels and the CUDA kernels share.
#pragma once

#if defined(__CUDACC__)
#define PSF_HOST_DEVICE __host__ __device__
#else
#define PSF_HOST_DEVICE
#endif
