// The largest class of each upsampled pixel of a tile.
#pragma once

#include "column.cuh"

namespace psf::cuda {

template <class T>
__global__ void __launch_bounds__(kThreads, 2) predict_kernel(const __grid_constant__ PredictWork<T> work) {
  const Axis<T>&rows = work.logits.rows, &columns = work.logits.columns;
  Shared shared(psf_shared_memory);
  const Group group(work.group, shared);
  Column<T> logits(work.logits, work.classes, group);
  const Tile tile = tile_at(work.tiling, rows.source, columns.source);
  const int right = columns.first[tile.column_end];
  for (int step = columns.first[tile.column]; step < right; step += group.step()) {
    const int x = min(step + group.place(), right - 1);
    logits.begin(tile.image, x);
    for (int y = rows.first[tile.row]; y < rows.first[tile.row_end]; ++y) {
      logits.move_to(tile.image, y);
      int best = logits.class_of(0);
      T largest = logits.value(0);
      logits.each([&](int k) {
        const T value = logits.value(k);
        if (value > largest) {
          largest = value;
          best = logits.class_of(k);
        }
      });
      group.best(largest, best);
      if (group.member() != 0 || step + group.place() >= right) continue;
      const int64_t at = (tile.image * rows.target + y) * columns.target + x;
      if (work.classes > 256) {
        static_cast<int64_t*>(work.labels)[at] = best;
      } else {
        static_cast<uint8_t*>(work.labels)[at] = uint8_t(best);
      }
    }
  }
}

}  // namespace psf::cuda
