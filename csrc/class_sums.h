// What the Dice loss is made of, and its gradient: sums of softmax probabilities over the labelled pixels of one band.
#pragma once

#include "gradient.h"
#include "upsample.h"
#include "view.h"

namespace psf::PSF_ISA {
namespace {

template <class T>
class ClassSumsBand {
 public:
  ClassSumsBand(const ClassSumsJob<T>& job, void* scratch)
      : job_(job),
        classes_(job.frame.classes),
        arena_(scratch),
        staged_(job.logits, classes_, arena_),
        logits_(staged_, arena_),
        gradient_(job.frame, job.logits, job.gradient, arena_),
        probability_(arena_.take<Vec<T>>(classes_)) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t item) {
    const Frame& frame = job_.frame;
    const int64_t image = item / frame.bands.count, band = item % frame.bands.count;
    const int64_t begin = frame.bands.row[band], end = frame.bands.row[band + 1];
    const bool backward = job_.gradient.map != nullptr;
    staged_.stage(image, begin, end);
    backward ? gradient_.begin_band(item) : begin_sums(item);
    for (int64_t x = 0; x < frame.width; x += kLanes<T>) {
      const int64_t pixels = frame.width - x < kLanes<T> ? frame.width - x : kLanes<T>;
      logits_.begin_columns(x);
      if (backward) gradient_.begin_columns(x);
      for (int64_t y = begin; y < end; ++y) {
        load_labels(image, y, x, pixels);
        logits_.row(y);
        backward ? add_gradients() : add_sums();
      }
      if (backward) gradient_.end_columns();
    }
    backward ? gradient_.end_band() : end_sums();
  }

 private:
  void load_labels(int64_t image, int64_t y, int64_t x, int64_t pixels) {
    labeled_ = Vec<T>{};
    for_labels<T>(job_.labels, job_.ignore_index, classes_, image, y, x, pixels, [&](int64_t i, int64_t label) {
      label_[i] = label;
      labeled_[i] = T(1);
    });
  }

  // Call use(i, label) for each pixel that has a label.
  template <class Use>
  void for_labeled(Use&& use) const {
    for (int i = 0; i < kLanes<T>; ++i) {
      if (labeled_[i] != T(0)) use(i, label_[i]);
    }
  }

  void begin_sums(int64_t item) {
    sums_ = job_.partial + item * 3 * classes_;
    for (int64_t i = 0; i < 3 * classes_; ++i) sums_[i] = 0;
    for (int64_t c = 0; c < classes_; ++c) probability_[c] = Vec<T>{};
  }

  void add_sums() {
    const Vec<T> share = labeled_ / logits_.sum();
    const Vec<T>* e = logits_.e();
    for (int64_t c = 0; c < classes_; ++c) probability_[c] += e[c] * share;
    for_labeled([&](int i, int64_t label) {
      sums_[label] += double(e[label][i] * share[i]);
      sums_[2 * classes_ + label] += 1;
    });
  }

  void end_sums() {
    for (int64_t c = 0; c < classes_; ++c) {
      for (int i = 0; i < kLanes<T>; ++i) sums_[classes_ + c] += double(probability_[c][i]);
    }
  }

  // With the gradients a of the sum of probabilities and b of the overlap, that of logit c is p_c (g_c - sum_k p_k
  // g_k), where g_c = a_c, plus b_c for the label.
  void add_gradients() {
    const Vec<T> share = labeled_ / logits_.sum(), weight = logits_.weight();
    const Vec<T>* e = logits_.e();
    const T *a = job_.of_probability, *b = job_.of_overlap;
    Vec<T> mean = sum_over<Vec<T>>(classes_, [&](int64_t c) { return e[c] * a[c]; });
    for_labeled([&](int i, int64_t label) { mean[i] += e[label][i] * b[label]; });
    mean *= share;
    gradient_.move_to(logits_.node());
    for (int64_t c = 0; c < classes_; ++c) gradient_.add(c, e[c] * share * (a[c] - mean), weight);
    for_labeled([&](int i, int64_t label) { gradient_.add(label, i, e[label][i] * share[i] * b[label], weight[i]); });
  }

  const ClassSumsJob<T>& job_;
  const int64_t classes_;
  Arena arena_;
  StagedMap<T> staged_;
  Upsampled<T> logits_;
  GradientBand<T> gradient_;
  Vec<T>* const probability_;  // [C] sums of the band so far, each of its lanes
  double* sums_ = nullptr;     // [3, C] of the band
  int64_t label_[kLanes<T>] = {};
  Vec<T> labeled_ = {};  // 1 for pixels with a label, else 0
};

}  // namespace
}  // namespace psf::PSF_ISA
