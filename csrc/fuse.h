// The fused pseudo label of one band, as a result.
#pragma once

#include <cstring>

#include "fusion.h"
#include "view.h"

namespace psf::PSF_ISA {
namespace {

// Copy past the caches where the instruction set can: a label of the output size is not read again soon.
inline void stream(const char* from, char* to, int64_t bytes) {
#if defined(__AVX2__)
  const int64_t before = int64_t(-reinterpret_cast<uintptr_t>(to) & (kBytes - 1));
  if (bytes >= before + kBytes) {
    std::memcpy(to, from, size_t(before));
    from += before, to += before, bytes -= before;
    for (; bytes >= kBytes; from += kBytes, to += kBytes, bytes -= kBytes) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#endif
    }
    _mm_sfence();  // other threads may read it after the usual synchronisation
  }
#endif
  std::memcpy(to, from, size_t(bytes));
}

// The label is written a band at a time: going down columns of all classes at once would write to as many pages, whose
// lines fall into the same sets of the first-level cache.
template <class T>
class FuseBand {
 public:
  FuseBand(const FuseJob<T>& job, void* scratch)
      : job_(job),
        size_(job.dtype == Dtype::f64   ? 8
              : job.dtype == Dtype::f32 ? 4
                                        : 2),
        pitch_((job.max_band_rows * job.frame.width * size_ + 4095) / 4096 * 4096 + 320),
        arena_(scratch),
        label_(job.fusion, job.frame.classes, arena_),
        buffer_(arena_.take<char>(job.frame.classes * pitch_)) {}

  int64_t scratch() const { return arena_.used(); }

  void run(int64_t item) {
    const Frame& frame = job_.frame;
    const int64_t image = item / frame.bands.count, band = item % frame.bands.count;
    const int64_t begin = frame.bands.row[band], end = frame.bands.row[band + 1];
    label_.stage(image, begin, end);
    for (int64_t x = 0; x < frame.width; x += kLanes<T>) {
      const int64_t pixels = frame.width - x < kLanes<T> ? frame.width - x : kLanes<T>;
      label_.begin_columns(x);
      for (int64_t y = begin; y < end; ++y) {
        label_.row(y, false);
        const Vec<T> scale = T(1) / label_.sum();
        char* to = buffer_ + ((y - begin) * frame.width + x) * size_;
        for (int64_t c = 0; c < frame.classes; ++c, to += pitch_) {
          const Vec<T> share = label_.power()[c] * scale;
          if (size_ == sizeof(T) && pixels == kLanes<T>) {
            store(reinterpret_cast<T*>(to), share);
          } else {
            store_row(to, job_.dtype, reinterpret_cast<const T*>(&share), pixels);
          }
        }
      }
    }
    for (int64_t c = 0; c < frame.classes; ++c) {
      char* to =
          static_cast<char*>(job_.label) + ((image * frame.classes + c) * frame.height + begin) * frame.width * size_;
      stream(buffer_ + c * pitch_, to, (end - begin) * frame.width * size_);
    }
  }

 private:
  const FuseJob<T>& job_;
  const int64_t size_, pitch_;
  Arena arena_;
  FusedLabel<T> label_;
  char* const buffer_;  // [C, pitch] bytes
};

}  // namespace
}  // namespace psf::PSF_ISA
