// What the CUDA kernels are asked to do, and how a result is cut into tiles. The structs own nothing.
//
// A tile is a rectangle of cells of the low-resolution map together with the output pixels in them; cell n of an axis
// lies between the nodes n and n + 1 and holds the outputs [first[n], first[n + 1]). A block does one tile. Tiles
// depend on shapes alone and every sum has a fixed order, so results are bitwise repeatable.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "host_device.h"
#include "tensors.h"

namespace psf::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Classes of one pixel that a thread keeps in registers, without spills for kBlocks blocks per multiprocessor.
template <class T>
constexpr int kSlots = sizeof(T) == 4 ? 6 : 4;
template <class T>
constexpr int kBlocks = sizeof(T) == 4 ? 2 : 1;

// Up to kThreads threads share a pixel; what a block keeps of two nodes of this many classes fits in its memory.
template <class T>
constexpr int64_t kMaxClasses = 4096 / sizeof(T);

// Linear interpolation along one axis: output i = (1 - weight[i]) node[low[i]] + weight[i] node[low[i] + 1], and
// W'W of its matrix W as diagonal and pairs.
template <class T>
struct Axis {
  int source, target;
  int32_t* low;    // [target]
  int32_t* first;  // [source + 1]
  T* weight;       // [target]
  T* diagonal;     // [source]
  T* pairs;        // [source] between a node and the next
};

// A low-resolution map of logits and its interpolation to the output size. Its values are used in units of ln 2:
// logit * factor[image] / ln 2.
template <class T>
struct Map {
  View view;
  Axis<T> rows, columns;
  const T* factor;  // [B], or null for 1
};

struct Tiling {
  int64_t images;
  int down, across;   // tiles of all images: [images, down, across]
  int rows, columns;  // cells of a tile
  PSF_HOST_DEVICE int64_t count() const { return images * down * across; }
};

// Row and column ranges of one tile, in nodes.
struct Tile {
  int64_t image;
  int row, row_end, column, column_end;
};

__device__ inline Tile tile_at(const Tiling& tiling, int height, int width) {
  const int across = int(blockIdx.x % unsigned(tiling.across)), rest = int(blockIdx.x / unsigned(tiling.across));
  const int row = rest % tiling.down * tiling.rows, column = across * tiling.columns;
  return {rest / tiling.down, row, min(row + tiling.rows, height), column, min(column + tiling.columns, width)};
}

// The gradient at nodes that the tile below or to the right owns: of each class first the column to the right, [rows],
// then the row below, [columns + 1].
PSF_HOST_DEVICE inline int overlap_size(const Tiling& tiling) { return tiling.rows + tiling.columns + 1; }

template <class T>
struct Fusion {
  Map<T> decoder, cam;
  T gamma, inverse_temperature;
  Power power;
  bool pixel_norm;
  T norm_eps;
};

template <class T>
struct LossWork {
  Tiling tiling;
  int group;  // threads that share a pixel
  int classes;
  Map<T> student;
  View target;            // [B, C, H, W]
  View labels;            // [B, H, W], u8 or i64
  int64_t ignore_index;   // ... of labels
  const T* class_weight;  // [C] or null
  const T* of_sums;       // [2, C] the gradients of the first two class sums
  Fusion<T> fusion;
  T threshold;
  bool hard;
  View weight;      // [B, H, W] or null
  View upstream;    // [B, H, W] or null: gradient of the unreduced loss
  T* loss;          // [B, H, W] or null
  T* gradient;      // [B, C, h, w] or null
  T* overlap;       // [tiles, C, overlap_size]
  double* partial;  // [tiles, 2] sum of the loss, sum of weights
};

template <class T>
struct PredictWork {
  Tiling tiling;
  int group;
  int classes;
  Map<T> logits;
  void* labels;  // [B, H, W], u8, or i64 for more than 256 classes
};

}  // namespace psf::cuda
