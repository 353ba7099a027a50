// The fused pseudo label of one vector of output pixels, never normalised in memory: y_c = power(c) / sum.
#pragma once

#include "upsample.h"

namespace psf::PSF_ISA {
namespace {

template <class T>
class FusedLabel {
 public:
  FusedLabel(const Fusion<T>& fusion, int64_t classes, Arena& arena)
      : fusion_(fusion),
        classes_(classes),
        staged_decoder_(fusion.decoder, classes, arena),
        staged_cam_(fusion.cam, classes, arena),
        decoder_(staged_decoder_, arena),
        cam_(staged_cam_, arena),
        power_(arena.take<Vec<T>>(classes)) {}

  void stage(int64_t image, int64_t begin, int64_t end) {
    staged_decoder_.stage(image, begin, end);
    staged_cam_.stage(image, begin, end);
  }

  void begin_columns(int64_t x) {
    decoder_.begin_columns(x);
    cam_.begin_columns(x);
  }

  // Compute the label of output row y, and with `find_best` its largest class and that class's share.
  void row(int64_t y, bool find_best) {
    if (fusion_.pixel_norm) {
      const Vec<T> squares = decoder_.squares(y) + cam_.squares(y);
      const Vec<T> scale = rsqrt<T>(squares + fusion_.norm_eps);
      decoder_.scaled_row(scale);
      cam_.scaled_row(scale);
    } else {
      decoder_.row(y);
      cam_.row(y);
    }
    const Vec<T>*p = decoder_.e(), *m = cam_.e();
    const Vec<T> from_decoder = fusion_.gamma / decoder_.sum(), from_cam = (T(1) - fusion_.gamma) / cam_.sum();
    const auto mixed = [&](int64_t c) { return from_decoder * p[c] + from_cam * m[c]; };
    switch (fusion_.power) {
      case Power::one:
        sum_ = sum_over<Vec<T>>(classes_, [&](int64_t c) { return power_[c] = mixed(c); });
        break;
      case Power::square:
        sum_ = sum_over<Vec<T>>(classes_, [&](int64_t c) {
          const Vec<T> t = mixed(c);
          return power_[c] = t * t;
        });
        break;
      case Power::any: {
        // exp2 has a least value: of a class that is ruled out, its root at a temperature above 1 would be a share.
        constexpr T least = sizeof(T) == 4 ? -125 : -999;
        const Vec<T> most = max_over<T>(classes_, [&](int64_t c) { return power_[c] = log2(mixed(c)); });
        sum_ = sum_over<Vec<T>>(classes_, [&](int64_t c) {
          const Vec<T> y = exp2((power_[c] - most) * fusion_.inverse_temperature);
          return power_[c] = power_[c] <= least ? Vec<T>{} : y;
        });
        break;
      }
    }
    if (find_best) {
      Vec<T> most = power_[0];
      best_ = Int<T>{};
      for (int64_t c = 1; c < classes_; ++c) {
        const Int<T> larger = power_[c] > most;
        most = larger ? power_[c] : most;
        best_ = larger ? Int<T>{} + typename Simd<T>::Lane(c) : best_;
      }
      confidence_ = most / sum_;
    }
  }

  const Vec<T>* power() const { return power_; }
  Vec<T> sum() const { return sum_; }
  Int<T> best() const { return best_; }
  Vec<T> confidence() const { return confidence_; }

 private:
  const Fusion<T>& fusion_;
  const int64_t classes_;
  StagedMap<T> staged_decoder_, staged_cam_;
  Upsampled<T> decoder_, cam_;
  Vec<T>* const power_;  // [C]
  Vec<T> sum_ = {}, confidence_ = {};
  Int<T> best_ = {};
};

}  // namespace
}  // namespace psf::PSF_ISA
