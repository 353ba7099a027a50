// What the Dice loss is made of: sums of softmax probabilities by class over the labelled pixels.
#pragma once

#include "column.cuh"

namespace psf::cuda {

template <class T>
struct ClassSumsWork {
  Tiling tiling;
  int group;
  int classes;
  Map<T> logits;
  View labels;  // [B, H, W], u8 or i64
  int64_t ignore_index;
  double* partial;  // [3, C, tiles]: probability of a class where it is the label, and anywhere; pixels of the label
};

constexpr int kRows = 32;  // summed apart from the others, so that the sums of large cells keep their digits

// Shared memory of a block: of each sum one value for every class and every warp, or, where several warps share a
// pixel, every pixel of a step.
PSF_HOST_DEVICE inline double* class_sums_memory(Shared& shared) { return shared.take<double>(3 * kThreads); }

// Sum what the threads of a block have of their classes, in a fixed order, into the block's part.
template <class T>
__device__ void write_class_sums(const ClassSumsWork<T>& work, const Group& group, double* memory, int k,
                                 double (&sums)[3]) {
  const int lane = threadIdx.x % 32, pixels = group.size() < 32 ? 32 / group.size() : 1;
  const int places = group.size() < 32 ? kWarps : group.step();
  const int place = group.size() < 32 ? int(threadIdx.x) / 32 : group.place();
  for (int i = 0; i < 3; ++i) {
    for (int offset = pixels / 2; offset > 0; offset >>= 1) sums[i] += __shfl_xor_sync(~0u, sums[i], offset);
    if (lane % pixels == 0) memory[i * kThreads + place * group.size() + group.member()] = sums[i];
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < 3 * group.size(); i += kThreads) {
    const int sum = i / group.size(), member = i % group.size(), c = k * group.size() + member;
    double total = 0;
    for (int n = 0; n < places; ++n) total += memory[sum * kThreads + n * group.size() + member];
    if (c < work.classes) work.partial[(int64_t(sum) * work.classes + c) * work.tiling.count() + blockIdx.x] = total;
  }
  __syncthreads();
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    class_sums_kernel(const __grid_constant__ ClassSumsWork<T> work) {
  const Axis<T>&rows = work.logits.rows, &columns = work.logits.columns;
  Shared shared(psf_shared_memory);
  const Group group(work.group, shared);
  double* const memory = class_sums_memory(shared);
  Column<T> logits(work.logits, work.classes, group);
  const Tile tile = tile_at(work.tiling, rows.source, columns.source);
  const int right = columns.first[tile.column_end];
  T overlap[kSlots<T>], probability[kSlots<T>];
  int counted[kSlots<T>];
#pragma unroll
  for (int k = 0; k < kSlots<T>; ++k) {
    overlap[k] = probability[k] = T(0);
    counted[k] = 0;
  }
  const int bottom = rows.first[tile.row_end];
  for (int step = columns.first[tile.column]; step < right; step += group.step()) {
    const bool counts = step + group.place() < right;
    const int x = counts ? step + group.place() : right - 1;
    logits.begin(tile.image, x);
    for (int top = rows.first[tile.row]; top < bottom; top += kRows) {
      T some_overlap[kSlots<T>], some_probability[kSlots<T>];
#pragma unroll
      for (int k = 0; k < kSlots<T>; ++k) some_overlap[k] = some_probability[k] = T(0);
      for (int y = top; y < min(top + kRows, bottom); ++y) {
        const int label = counts ? read_label(work.labels, tile.image, y, x, work.ignore_index, work.classes) : -1;
        logits.move_to(tile.image, y);
        T e[kSlots<T>], most[1] = {logits.value(0)}, total[1] = {T(0)};
        logits.each([&](int k) {
          e[k] = logits.value(k);
          most[0] = e[k] > most[0] ? e[k] : most[0];
        });
        group.max(most);
        logits.each([&](int k) { total[0] += e[k] = exp2_of(e[k] - most[0]); });
        group.sum(total);
        if (label < 0) continue;
        const T share = T(1) / total[0];
        logits.each([&](int k) {
          const bool own = logits.class_of(k) == label;
          some_probability[k] += e[k] * share;
          some_overlap[k] += own ? e[k] * share : T(0);
          counted[k] += own;
        });
      }
      logits.each([&](int k) {
        overlap[k] += some_overlap[k];
        probability[k] += some_probability[k];
      });
    }
  }
  for (int k = 0; k * group.size() < work.classes; ++k) {
    double sums[3] = {0, 0, 0};
#pragma unroll
    for (int i = 0; i < kSlots<T>; ++i) {  // registers have no index
      if (i != k) continue;
      sums[0] = double(overlap[i]);
      sums[1] = double(probability[i]);
      sums[2] = double(counted[i]);
    }
    write_class_sums(work, group, memory, k, sums);
  }
}

template <class T>
struct SumOfTilesWork {
  const double* partial;  // [sums, tiles]
  int64_t tiles;
  T* sums;
};

// Block i: sum i.
template <class T>
__global__ void sum_of_tiles_kernel(const __grid_constant__ SumOfTilesWork<T> work) {
  const double* const from = work.partial + blockIdx.x * work.tiles;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < work.tiles; i += kThreads) sum += from[i];
  sum = block_sum(sum, psf_shared_memory);
  if (threadIdx.x == 0) work.sums[blockIdx.x] = T(sum);
}

}  // namespace psf::cuda
