// The largest class of each upsampled pixel of one band.
#pragma once

#include "upsample.h"

namespace psf::PSF_ISA {
namespace {

template <class T>
class PredictBand {
 public:
  PredictBand(const PredictJob<T>& job, void* scratch)
      : job_(job), arena_(scratch), staged_(job.logits, job.frame.classes, arena_), logits_(staged_, arena_) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t item) {
    const Frame& frame = job_.frame;
    const int64_t image = item / frame.bands.count, band = item % frame.bands.count;
    const int64_t begin = frame.bands.row[band], end = frame.bands.row[band + 1];
    staged_.stage(image, begin, end);
    for (int64_t x = 0; x < frame.width; x += kLanes<T>) {
      const int64_t pixels = frame.width - x < kLanes<T> ? frame.width - x : kLanes<T>;
      logits_.begin_columns(x);
      for (int64_t y = begin; y < end; ++y) {
        logits_.move_to(y);
        const Int<T> best = largest();
        const int64_t at = (image * frame.height + y) * frame.width + x;
        for (int64_t i = 0; i < pixels; ++i) {
          if (frame.classes > 256) {
            static_cast<int64_t*>(job_.labels)[at + i] = best[i];
          } else {
            static_cast<uint8_t*>(job_.labels)[at + i] = uint8_t(best[i]);
          }
        }
      }
    }
  }

 private:
  // The first of the largest classes. Each chain takes a block of classes, so a later chain wins only if larger; past
  // the end the last class is met again, which is never larger than itself.
  Int<T> largest() const {
    constexpr int kChains = 3;
    const int64_t classes = job_.frame.classes, block = (classes + kChains - 1) / kChains;
    Vec<T> most[kChains];
    Int<T> best[kChains];
    const auto nth = [&](int i, int64_t k) { return i * block + k < classes ? i * block + k : classes - 1; };
    for (int i = 0; i < kChains; ++i) {
      most[i] = logits_.value(nth(i, 0));
      best[i] = Int<T>{} + typename Simd<T>::Lane(nth(i, 0));
    }
    for (int64_t k = 1; k < block; ++k) {
      for (int i = 0; i < kChains; ++i) {
        const Vec<T> value = logits_.value(nth(i, k));
        const Int<T> larger = value > most[i];
        most[i] = larger ? value : most[i];
        best[i] = larger ? Int<T>{} + typename Simd<T>::Lane(nth(i, k)) : best[i];
      }
    }
    for (int i = 1; i < kChains; ++i) {
      const Int<T> larger = most[i] > most[0];
      most[0] = larger ? most[i] : most[0];
      best[0] = larger ? best[i] : best[0];
    }
    return best[0];
  }

  const PredictJob<T>& job_;
  Arena arena_;
  StagedMap<T> staged_;
  Upsampled<T> logits_;
};

}  // namespace
}  // namespace psf::PSF_ISA
