// CPU kernels: losses, fusion and prediction from low-resolution maps, and convolutions of single channels. No map of
// the output size is stored but a label that is the result: each band keeps vectors of [C] pixels in the first-level
// cache. Compiled once per instruction set, see kernels_cpu.h.
//
//   loss.h  class_sums.h  fuse.h  predict.h  square.h  depthwise.h
//                                           the work of one item, one file for each entry of the table
//   fusion.h                                pseudo label of a vector of pixels
//   upsample.h  gradient.h                  interpolation with exponentials; its transpose
//   view.h  vec.h                           tensors; vectors

#include "kernels_cpu.h"

#include "class_sums.h"
#include "depthwise.h"
#include "fuse.h"
#include "loss.h"
#include "predict.h"
#include "square.h"

namespace psf::PSF_ISA {
namespace {

template <class Band, class Job>
int64_t scratch_of(const Job& job) {
  return Band(job, nullptr).scratch();
}

template <class Band, class Job>
void run(const Job& job, int64_t item, void* scratch) {
  const FlushSubnormals flush;
  Band(job, scratch).run(item);
}

template <class T>
constexpr Kernels<T> kKernels = {
    &scratch_of<LossBand<T>, LossJob<T>>,
    &run<LossBand<T>, LossJob<T>>,
    &scratch_of<ClassSumsBand<T>, ClassSumsJob<T>>,
    &run<ClassSumsBand<T>, ClassSumsJob<T>>,
    &scratch_of<FuseBand<T>, FuseJob<T>>,
    &run<FuseBand<T>, FuseJob<T>>,
    &scratch_of<PredictBand<T>, PredictJob<T>>,
    &run<PredictBand<T>, PredictJob<T>>,
    &square_sum<T>,
    kLanes<T>,
    &scratch_of<DepthwiseBand<T>, DepthwiseJob<T>>,
    &run<DepthwiseBand<T>, DepthwiseJob<T>>,
    &scratch_of<DepthwiseFilterBand<T>, DepthwiseJob<T>>,
    &run<DepthwiseFilterBand<T>, DepthwiseJob<T>>,
};

}  // namespace

const Kernels<float>& f32() { return kKernels<float>; }
const Kernels<double>& f64() { return kKernels<double>; }

}  // namespace psf::PSF_ISA
