// How a loss or a prediction is laid out on the device: tables of its axes, threads to a pixel, tiles.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "arguments.h"
#include "axes.cuh"
#include "launch.h"
#include "memory.cuh"
#include "work.cuh"

namespace psf::cuda {

constexpr int64_t kSharedBytes = 48 << 10;  // of a block, without asking for more

// The least power of two of threads that hold the classes of a pixel.
template <class T>
int group_size(int64_t classes) {
  STD_TORCH_CHECK(classes <= kMaxClasses<T>, "the CUDA kernels take up to ", kMaxClasses<T>, " classes, got ", classes);
  int size = 1;
  while (int64_t(size) * kSlots<T> < classes) size *= 2;
  return size;
}

// Cells of one axis for a tile of about `pixels`, no fewer than one, all tiles about equal.
inline int cells_of(int64_t source, int64_t target, int64_t pixels, int64_t most) {
  const double scale = double(target) / double(source);
  const int64_t fitting =
      std::clamp<int64_t>(int64_t((double(pixels) - scale / 2) / scale), 1, std::max<int64_t>(most, 1));
  const int64_t tiles = (source + fitting - 1) / fitting;
  return int((source + tiles - 1) / tiles);
}

// `most_columns` bounds the cells across, for what a block keeps of each.
inline Tiling tiling_of(int64_t images, int64_t height, int64_t width, int64_t out_height, int64_t out_width, int step,
                        int64_t most_columns) {
  constexpr int64_t kPixels = 2048;  // few enough to give every multiprocessor work, enough that borders are few
  const int64_t across = std::max(step, 64);
  const int rows = cells_of(height, out_height, std::max<int64_t>(kPixels / across, 16), height);
  const int columns = cells_of(width, out_width, across, most_columns);
  return {images, int((height + rows - 1) / rows), int((width + columns - 1) / columns), rows, columns};
}

// Tables of the axes of up to kMaxAxes / 2 maps. They live as long as this.
template <class T>
class Maps {
 public:
  Maps(const Launcher& launch, const std::vector<const Tensor*>& logits, int64_t height, int64_t width,
       bool align_corners) {
    int64_t integers = 0, reals = 0, longest = 0;
    for (const Tensor* map : logits) {
      for (const auto& [source, target] : {std::pair(map->size(2), height), std::pair(map->size(3), width)}) {
        STD_TORCH_CHECK(std::max(source, target) < INT32_MAX, "a side must be shorter than 2^31 pixels");
        integers += target + source + 1;
        reals += target + 2 * source;
        longest = std::max({longest, target, source + 1});
      }
    }
    const Tensor& like = *logits.front();
    integers_ = torch::stable::new_empty(like, {integers}, ScalarType::Int);
    reals_ = torch::stable::new_empty(like, {reals}, kScalarType<T>);
    int32_t* integer = integers_.template mutable_data_ptr<int32_t>();
    T* real = reals_.template mutable_data_ptr<T>();
    const auto axis = [&](int64_t source, int64_t target) {
      const Axis<T> made = {int(source),   int(target),           integer, integer + target, real,
                            real + target, real + target + source};
      integer += target + source + 1;
      real += target + 2 * source;
      return made;
    };
    AxesWork<T> work = {};
    work.align_corners = align_corners;
    for (const Tensor* map : logits) {
      maps_.push_back({view_of(*map), axis(map->size(2), height), axis(map->size(3), width), nullptr});
      work.axes[2 * maps_.size() - 2] = maps_.back().rows;
      work.axes[2 * maps_.size() - 1] = maps_.back().columns;
    }
    launch(axes_kernel<T>, (longest + kThreads - 1) / kThreads, int64_t(2 * maps_.size()), 0, work);
  }

  Map<T>& operator[](size_t i) { return maps_[i]; }

 private:
  Tensor integers_, reals_;
  std::vector<Map<T>> maps_;
};

}  // namespace psf::cuda
