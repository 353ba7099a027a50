// What the Dice loss is made of: sums of softmax probabilities by class over the labelled pixels of one band.
#pragma once

#include "upsample.h"
#include "view.h"

namespace psf::PSF_ISA {
namespace {

template <class T>
class ClassSumsBand {
 public:
  ClassSumsBand(const ClassSumsJob<T>& job, void* scratch)
      : job_(job),
        arena_(scratch),
        staged_(job.logits, job.frame.classes, arena_),
        logits_(staged_, arena_),
        probability_(arena_.take<Vec<T>>(job.frame.classes)) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t item) {
    const Frame& frame = job_.frame;
    const int64_t image = item / frame.bands.count, band = item % frame.bands.count, classes = frame.classes;
    const int64_t begin = frame.bands.row[band], end = frame.bands.row[band + 1];
    double* const overlap = job_.partial + item * 3 * classes;
    double *const probability = overlap + classes, *const counted = probability + classes;
    for (int64_t i = 0; i < 3 * classes; ++i) overlap[i] = 0;
    staged_.stage(image, begin, end);
    for (int64_t x = 0; x < frame.width; x += kLanes<T>) {
      const int64_t pixels = frame.width - x < kLanes<T> ? frame.width - x : kLanes<T>;
      logits_.begin_columns(x);
      for (int64_t first = begin; first < end; first += kRows) {
        const int64_t last = end - first < kRows ? end : first + kRows;
        for (int64_t c = 0; c < classes; ++c) probability_[c] = Vec<T>{};
        for (int64_t y = first; y < last; ++y) {
          logits_.row(y);
          const Vec<T> share = T(1) / logits_.sum();
          const Vec<T>* e = logits_.e();
          Int<T> labeled = {};
          for_labels<T>(job_.classes, job_.ignore_index, classes, image, y, x, pixels, [&](int64_t i, int64_t label) {
            labeled[i] = -1;
            overlap[label] += double(e[label][i] * share[i]);
            counted[label] += 1;
          });
          for (int64_t c = 0; c < classes; ++c) probability_[c] += labeled ? e[c] * share : Vec<T>{};
        }
        for (int64_t c = 0; c < classes; ++c) {
          T sum = probability_[c][0];
          for (int i = 1; i < kLanes<T>; ++i) sum += probability_[c][i];
          probability[c] += double(sum);
        }
      }
    }
  }

 private:
  static constexpr int64_t kRows = 32;  // summed as T: few enough to lose no digits

  const ClassSumsJob<T>& job_;
  Arena arena_;
  StagedMap<T> staged_;
  Upsampled<T> logits_;
  Vec<T>* const probability_;  // [C] of up to kRows rows
};

}  // namespace
}  // namespace psf::PSF_ISA
