// What the CPU kernels are asked to do, and their table of functions, one per instruction set.
//
// kernels_cpu.cpp is compiled once for each instruction set with -DPSF_ISA=baseline|avx2|avx512 and the flags of that
// set, into the namespace of that name. ops.cpp, compiled for the baseline, fills in the structs below and calls the
// table of the set in use. The structs own nothing.
//
// A job is cut into items: an image and a band of output rows. Bands depend on shapes alone, an item is done by one
// thread, and partial results are combined in the order of the items: every result is bitwise the same for any number
// of threads.
#pragma once

#include <cstdint>

#include "tensors.h"

namespace psf {

// Linear interpolation along one axis: output i = (1 - weight[i]) node[low[i]] + weight[i] node[low[i] + 1].
// The weight is 0 where low[i] is the last node.
template <class T>
struct Axis {
  int64_t source, target;
  const int32_t* low;     // [target]
  const T* weight;        // [target]
  const uint8_t* steady;  // [target] 1 where output i is one `step` after output i - 1 between the same nodes
  T step;

  // Output i is node i.
  bool same() const { return source == target; }
};

// The transposed interpolation along x as a gather: node n adds up the columns column[phase][n], its own with weight
// `low` and those of node n - 1 with weight `high`. Columns that clamping adds to a node are listed apart.
template <class T>
struct Fold {
  int64_t phases, pitch, extras;
  const int32_t* column;  // [phases, pitch]
  const int32_t* base;    // [pitch / 16] first column of 16 nodes that have 64 columns or fewer, else -1
  const T* low;           // [phases, pitch]
  const T* high;          // [phases, pitch]
  const int32_t* extra;   // [extras] columns
};

// A low-resolution map of logits and its interpolation to the output size. Its values are used in units of ln 2:
// logit * factor[image] / ln 2.
template <class T>
struct Map {
  View view;
  Axis<T> rows, columns;
  const T* factor;   // [B]
  int64_t max_rows;  // rows that the largest band touches

  // A pixel is a node: nothing is interpolated.
  bool same() const { return rows.same() && columns.same(); }
};

// Output rows [row[i], row[i + 1]) are band i; it owns the rows [node[i], node[i + 1]) of the gradient.
struct Bands {
  int64_t count;
  const int64_t* row;
  const int64_t* node;
};

struct Frame {
  int64_t images, classes, height, width;
  Bands bands;
};

// The pseudo label of DESIGN: gamma softmax(decoder) + (1 - gamma) softmax(cam), to the power 1 / temperature.
template <class T>
struct Fusion {
  Map<T> decoder, cam;
  T gamma, inverse_temperature;
  Power power;
  bool pixel_norm;
  T norm_eps;
};

template <class T>
struct LossJob {
  Frame frame;
  Map<T> student;
  Label label;
  View target;            // [B, C, H, W]
  View classes;           // [B, H, W], u8 or i64
  int64_t ignore_index;   // ... of classes
  const T* class_weight;  // [C] or null
  const T* of_sums;       // [2, C] the gradients of the first two class sums
  Fusion<T> fusion;
  T threshold;
  bool hard;
  View weight;      // [B, H, W] or null
  View upstream;    // [B, H, W] or null: gradient of the unreduced loss
  T* loss;          // [B, H, W] or null
  double* partial;  // [items, 2] sum of the loss, sum of weights
  T* gradient;      // [B, C, h, w] or null
  T* overlap;       // [items, C, w] gradient of the row below the owned ones, unused if student.same()
  Fold<T> fold;
};

// Sums over the pixels that have a label: of each class's probability where it is the label, of its probability
// anywhere, and of the pixels whose label it is.
template <class T>
struct ClassSumsJob {
  Frame frame;
  Map<T> logits;
  View classes;  // [B, H, W], u8 or i64
  int64_t ignore_index;
  double* partial;  // [items, 3, C]
};

template <class T>
struct FuseJob {
  Frame frame;
  Fusion<T> fusion;
  void* label;  // [B, C, H, W]
  Dtype dtype;
  int64_t max_band_rows;
};

template <class T>
struct PredictJob {
  Frame frame;
  Map<T> logits;
  void* labels;  // [B, H, W], u8, or i64 for more than 256 classes
};

// Mean of squares: W'W of each axis as diagonal and pairs, both [source] and zero up to kPadding more.
constexpr int64_t kPadding = 16;
template <class T>
struct SquareJob {
  View logits;            // [B, C, h, w]
  int64_t height, width;  // h and w
  const T *rows, *row_pairs, *columns, *column_pairs;
};

// One axis of a convolution. Output i is the sum over taps k of filter[k] * source[(i * stride - padding + k *
// dilation) / spread], where that is an element: `spread` - 1 zeros lie between two elements of the source. `live` taps
// from `first` on meet an element for some i.
struct DepthwiseAxis {
  int64_t source, target, taps, stride, padding, dilation, spread, first, live;
};

// A convolution of each channel with a filter of its own, and the gradient of that filter. Of the rows all taps are
// kept.
template <class T>
struct DepthwiseJob {
  DepthwiseAxis rows, columns;
  int64_t channels;
  int64_t blocks;                       // vectors of channels
  int64_t band;                         // output rows of an item; items are (image, band, block)
  int64_t staged_rows, staged_columns;  // that a band needs of the source, zeros included
  const T* input;                       // [B, rows.source, columns.source, C]
  const T* filter;                      // [blocks, rows.taps, columns.live, lanes]
  const T* bias;                        // [blocks * lanes] or null
  T* output;                            // [B, rows.target, columns.target, C]
  const T* upstream;                    // the gradient of the output
  T* partial;                           // [items, rows.taps, columns.live, lanes] gradient of the filter
};

// Bytes of scratch memory of one item, aligned to 64; and the work of one item.
template <class T>
struct Kernels {
  int64_t (*loss_scratch)(const LossJob<T>&);
  void (*loss)(const LossJob<T>&, int64_t item, void* scratch);
  int64_t (*class_sums_scratch)(const ClassSumsJob<T>&);
  void (*class_sums)(const ClassSumsJob<T>&, int64_t item, void* scratch);
  int64_t (*fuse_scratch)(const FuseJob<T>&);
  void (*fuse)(const FuseJob<T>&, int64_t item, void* scratch);
  int64_t (*predict_scratch)(const PredictJob<T>&);
  void (*predict)(const PredictJob<T>&, int64_t item, void* scratch);
  // Sum of squares at the output size of one channel of one image; scratch holds two rows of w + 2 kPadding.
  double (*square_sum)(const SquareJob<T>&, int64_t image, int64_t channel, T* scratch);
  int64_t lanes;  // of a vector of channels
  int64_t (*depthwise_scratch)(const DepthwiseJob<T>&);
  void (*depthwise)(const DepthwiseJob<T>&, int64_t item, void* scratch);
  int64_t (*depthwise_filter_scratch)(const DepthwiseJob<T>&);
  void (*depthwise_filter)(const DepthwiseJob<T>&, int64_t item, void* scratch);
};

#define PSF_KERNELS_CPU(isa)    \
  namespace psf::isa {          \
  const Kernels<float>& f32();  \
  const Kernels<double>& f64(); \
  }

}  // namespace psf

PSF_KERNELS_CPU(baseline)
#if defined(__x86_64__)
PSF_KERNELS_CPU(avx2)
PSF_KERNELS_CPU(avx512)
#endif
