// What the student's softmax should be at one pixel: `share(k)` of each class, before its sum divides it.
#pragma once

#include "column.cuh"

namespace psf::cuda {

// The fused pseudo label: (gamma softmax(decoder) + (1 - gamma) softmax(cam))^(1 / temperature).
template <class T>
class FusedLabel {
 public:
  __device__ FusedLabel(const Fusion<T>& fusion, int classes, const Group& group)
      : fusion_(fusion), decoder_(fusion.decoder, classes, group), cam_(fusion.cam, classes, group) {}

  __device__ void begin(int64_t image, int x) {
    decoder_.begin(image, x);
    cam_.begin(image, x);
  }

  __device__ __forceinline__ void row(int64_t image, int y, const Group& group) {
    decoder_.move_to(image, y);
    cam_.move_to(image, y);
    T scale = T(1);
    if (fusion_.pixel_norm) {
      T squares[1] = {T(0)};
      decoder_.each([&](int k) {
        if (!decoder_.has(k)) return;
        const T p = decoder_.value(k), m = cam_.value(k);
        squares[0] += p * p + m * m;
      });
      group.sum(squares);
      scale = T(1) / sqrt(squares[0] * T(kLn2 * kLn2) + fusion_.norm_eps);
    }
    T e[kSlots<T>], most[2] = {decoder_.value(0) * scale, cam_.value(0) * scale}, sums[2] = {T(0), T(0)};
    decoder_.each([&](int k) {
      share_[k] = decoder_.value(k) * scale;
      e[k] = cam_.value(k) * scale;
      most[0] = share_[k] > most[0] ? share_[k] : most[0];
      most[1] = e[k] > most[1] ? e[k] : most[1];
    });
    group.max(most);
    decoder_.each([&](int k) {
      share_[k] = exp2_of(share_[k] - most[0]);
      e[k] = exp2_of(e[k] - most[1]);
      sums[0] += share_[k];
      sums[1] += e[k];
    });
    group.sum(sums);
    const T from_decoder = fusion_.gamma / sums[0], from_cam = (T(1) - fusion_.gamma) / sums[1];
    decoder_.each([&](int k) { share_[k] = from_decoder * share_[k] + from_cam * e[k]; });
    if (fusion_.power == Power::square) {
      decoder_.each([&](int k) { share_[k] *= share_[k]; });
    } else if (fusion_.power == Power::any) {
      sharpen(group);
    }
  }

  __device__ T share(int k) const { return share_[k]; }

 private:
  __device__ __forceinline__ void sharpen(const Group& group) {
    T most[1] = {T(-2000)};  // below every logarithm, yet a number
    decoder_.each([&](int k) {
      share_[k] = log2_of(share_[k]);  // of a class that is ruled out, and of one that is not there, -inf
      most[0] = share_[k] > most[0] ? share_[k] : most[0];
    });
    group.max(most);
    decoder_.each([&](int k) { share_[k] = exp2_of((share_[k] - most[0]) * fusion_.inverse_temperature); });
  }

  const Fusion<T>& fusion_;
  Column<T> decoder_, cam_;
  T share_[kSlots<T>];
};

}  // namespace psf::cuda
