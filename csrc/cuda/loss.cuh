// The losses of a tile and their gradient at the nodes. No value of the output size is stored but an unreduced loss.
//
// A block walks down the rows of cells of its tile. Within a row of cells each thread goes down one column of output
// pixels with some of its classes in registers, and sums the gradient for the nodes above and below; the columns are
// then folded onto the nodes through shared memory. The nodes of a tile are written once; what its last row and column
// of cells add to nodes of other tiles goes to `overlap` and is added by finish.cuh: no atomics, one fixed order.
#pragma once

#include "label.cuh"

namespace psf::cuda {

// Shared memory of a block, counted on the host by the same code that deals it out.
template <class T>
struct LossMemory {
  PSF_HOST_DEVICE LossMemory(Shared& shared, const LossWork<T>& work)
      : sums(shared.take<double>(2 * kThreads)),
        exchange(shared.take<double>(kWarps)),
        pitch(kThreads / work.group + (work.group < 32 ? 32 / work.group : 1)),
        column_nodes(work.tiling.columns + 1),
        columns(shared.take<T>(work.gradient ? 2 * kSlots<T> * work.group * pitch : 0)),
        nodes(shared.take<T>(work.gradient ? 2 * work.classes * column_nodes : 0)) {}

  double* sums;      // [2, kThreads] of the loss and of the weights, by thread
  double* exchange;  // [kWarps]
  int pitch;         // a step of pixels and a little, which spreads the members of a pixel over the banks
  int column_nodes;
  T* columns;  // [2, slots * group, pitch] gradient for the nodes above and below, of each column
  T* nodes;    // [2, C, column_nodes] gradient at two rows of nodes, even and odd
};

template <class T, Label kLabel>
class LossTile {
 public:
  __device__ LossTile(const LossWork<T>& work, Shared& shared)
      : work_(work),
        group_(work.group, shared),
        memory_(shared, work),
        tile_(tile_at(work.tiling, work.student.rows.source, work.student.columns.source)),
        student_(work.student, work.classes, group_),
        label_(work.fusion, work.classes, group_) {}

  __device__ void run() {
    const Axis<T>&rows = work_.student.rows, &columns = work_.student.columns;
    const int left = columns.first[tile_.column], right = columns.first[tile_.column_end];
    const int nodes = work_.classes * memory_.column_nodes;
    memory_.sums[threadIdx.x] = memory_.sums[kThreads + threadIdx.x] = 0;
    if (work_.gradient) {
      for (int i = threadIdx.x; i < 2 * nodes; i += kThreads) memory_.nodes[i] = T(0);
      __syncthreads();
    }
    int at = -1;
    for (int node = tile_.row; node < tile_.row_end; ++node) {
      const int top = rows.first[node], bottom = rows.first[node + 1];
      for (int x = left; x < right && top < bottom; x += group_.step()) {
        const int end = min(x + group_.step(), right);
        if (x != at) begin_column(x, end);
        at = x;
        walk(top, bottom);
        if (work_.gradient) fold(node, x, end);
      }
      if (work_.gradient) write_row(node);
    }
    if (work_.gradient && tile_.row_end < rows.source) write_overlap_row();
    const double loss = block_sum(memory_.sums[threadIdx.x], memory_.exchange);
    const double weight = block_sum(memory_.sums[kThreads + threadIdx.x], memory_.exchange);
    if (threadIdx.x == 0) {
      work_.partial[2 * int64_t(blockIdx.x)] = loss;
      work_.partial[2 * int64_t(blockIdx.x) + 1] = weight;
    }
  }

 private:
  // Threads behind the last column repeat it without weight.
  __device__ void begin_column(int x, int end) {
    counts_ = x + group_.place() < end;
    x_ = counts_ ? x + group_.place() : end - 1;
    student_.begin(tile_.image, x_);
    if constexpr (kLabel == Label::fused) label_.begin(tile_.image, x_);
  }

  __device__ __forceinline__ void walk(int top, int bottom) {
#pragma unroll
    for (int k = 0; k < kSlots<T>; ++k) sum_[k] = below_[k] = T(0);
    for (int y = top; y < bottom; ++y) {
      T counted = counts_ ? T(1) : T(0);
      const T value = kLabel == Label::sums ? add_of_sums(y, counted) : pixel(y, counted);
      if (group_.member() != 0 || !counts_) continue;
      memory_.sums[threadIdx.x] += double(value);
      memory_.sums[kThreads + threadIdx.x] += double(counted);
      if (work_.loss) {
        const int64_t height = work_.student.rows.target, width = work_.student.columns.target;
        work_.loss[(tile_.image * height + y) * width + x_] = value;
      }
    }
  }

  // Return the loss of a pixel; `counted` becomes its weight in the mean.
  __device__ __forceinline__ T pixel(int y, T& counted) {
    int label = -1;  // of a hard label
    if constexpr (kLabel == Label::classes) {
      label = read_label(work_.labels, tile_.image, y, x_, work_.ignore_index, work_.classes);
      counted = label < 0 ? T(0) : work_.class_weight ? counted * work_.class_weight[label] : counted;
    } else if (work_.weight.data) {
      counted *= read_pixel<T>(work_.weight, tile_.image, y, x_);
    }
    T w = counted;
    if (work_.upstream.data) w *= read_pixel<T>(work_.upstream, tile_.image, y, x_);
    student_.move_to(tile_.image, y);
    if constexpr (kLabel == Label::fused) {
      label_.row(tile_.image, y, group_);
      label = decide(w);
    }
    T most[1] = {student_.value(0)}, e[kSlots<T>], share[kSlots<T>];
    student_.each([&](int k) {
      e[k] = student_.value(k);
      most[0] = e[k] > most[0] ? e[k] : most[0];
    });
    group_.max(most);
    if constexpr (kLabel == Label::target) read_target(y, share);
    T sums[3] = {T(0), T(0), T(0)};  // of exponentials, of shares, of shares times logits
    student_.each([&](int k) {
      if constexpr (kLabel == Label::fused) share[k] = work_.hard ? T(student_.class_of(k) == label) : label_.share(k);
      if constexpr (kLabel == Label::classes) share[k] = T(student_.class_of(k) == label);
      sums[2] += share[k] * e[k];
      e[k] = exp2_of(e[k] - most[0]);
      sums[0] += e[k];
      sums[1] += share[k];
    });
    group_.sum(sums);

    const bool normalised = kLabel == Label::fused && !work_.hard;
    const T scale = normalised ? w / sums[1] : w, total = kLabel == Label::target ? w * sums[1] : w;
    const T of_student = total / sums[0], weight = student_.weight();
    student_.each([&](int k) {
      const T g = e[k] * of_student - share[k] * scale;
      sum_[k] += g;
      below_[k] += weight * g;
    });
    return pixel_loss<T>(w, total, log2_of(sums[0]) + most[0], scale * sums[2]);
  }

  // With the gradients b of a class's probability where it is the label and a of its probability anywhere, that of
  // logit c is p_c (g_c - sum_k p_k g_k), where g_c = a_c, plus b_c for the label. There is no loss.
  __device__ __forceinline__ T add_of_sums(int y, T counted) {
    const int label = read_label(work_.labels, tile_.image, y, x_, work_.ignore_index, work_.classes);
    student_.move_to(tile_.image, y);
    T most[1] = {student_.value(0)}, e[kSlots<T>], given[kSlots<T>], sums[2] = {T(0), T(0)};
    student_.each([&](int k) {
      e[k] = student_.value(k);
      most[0] = e[k] > most[0] ? e[k] : most[0];
    });
    group_.max(most);
    student_.each([&](int k) {
      const int c = student_.class_of(k);
      given[k] = student_.has(k) ? work_.of_sums[work_.classes + c] : T(0);
      if (c == label) given[k] += work_.of_sums[c];
      e[k] = exp2_of(e[k] - most[0]);
      sums[0] += e[k];
      sums[1] += e[k] * given[k];
    });
    group_.sum(sums);
    const T share = (label < 0 ? T(0) : counted) / sums[0], mean = sums[1] / sums[0], weight = student_.weight();
    student_.each([&](int k) {
      const T g = e[k] * share * (given[k] - mean);
      sum_[k] += g;
      below_[k] += weight * g;
    });
    return T(0);
  }

  // The class of a hard fused label. A label that is not sure enough loses its weight; a NaN is not hidden.
  __device__ __forceinline__ int decide(T& w) {
    const bool thresholded = work_.threshold > T(0);
    int best = group_.member();
    if (!thresholded && !work_.hard) return best;
    T largest = label_.share(0), sum[1] = {T(0)};
    student_.each([&](int k) {
      sum[0] += label_.share(k);
      if (label_.share(k) > largest) {
        largest = label_.share(k);
        best = student_.class_of(k);
      }
    });
    group_.sum(sum);
    group_.best(largest, best);
    const T confidence = largest / sum[0];
    if (thresholded && confidence < work_.threshold) w = T(0);
    if (work_.hard) w += T(0) * sum[0];
    return best;
  }

  __device__ void read_target(int y, T (&share)[kSlots<T>]) const {
    const int64_t* strides = work_.target.strides;
    const int64_t at = tile_.image * strides[0] + group_.member() * strides[1] + y * strides[2] + x_ * strides[3];
    with_reader<T>(work_.target, [&](auto read) {
      student_.each([&](int k) { share[k] = student_.has(k) ? read(at + k * group_.size() * strides[1]) : T(0); });
    });
  }

  // Add the columns [x, end) to the nodes between which they lie: each node gathers, in a fixed order.
  __device__ void fold(int row, int x, int end) {
    const Axis<T>& axis = work_.student.columns;
    const int pitch = memory_.pitch, slots = kSlots<T> * group_.size();
    student_.each([&](int k) {
      T* to = memory_.columns + student_.class_of(k) * pitch + group_.place();
      to[0] = sum_[k] - below_[k];
      to[slots * pitch] = below_[k];
    });
    __syncthreads();
    const int begin_node = axis.low[x];
    const int count = axis.low[end - 1] - begin_node + 2;
    for (int i = threadIdx.x; i < 2 * work_.classes * count; i += kThreads) {
      const int node = begin_node + i % count, line = i / count;  // line = c, or C + c for the nodes below
      const bool lower = line >= work_.classes;
      const int c = lower ? line - work_.classes : line;
      const T* from = memory_.columns + ((lower ? slots : 0) + c) * pitch - x;
      const int own = clamped(axis.first[node], x, end);
      T sum = T(0);
      for (int k = node > 0 ? clamped(axis.first[node - 1], x, end) : own; k < own; ++k) {
        sum += axis.weight[k] * from[k];
      }
      const int last = node < axis.source ? clamped(axis.first[node + 1], x, end) : own;
      for (int k = own; k < last; ++k) sum += (T(1) - axis.weight[k]) * from[k];
      nodes_of(lower ? row + 1 : row)[c * memory_.column_nodes + node - tile_.column] += sum;
    }
    __syncthreads();
  }

  static __device__ int clamped(int value, int least, int most) {
    return value < least ? least : value > most ? most : value;
  }

  __device__ T* nodes_of(int row) const { return memory_.nodes + row % 2 * work_.classes * memory_.column_nodes; }

  // Write a finished row of nodes, and the one to its right that another tile owns; its memory is the next row's.
  __device__ void write_row(int row) {
    const int64_t height = work_.student.rows.source, width = work_.student.columns.source;
    const int own = tile_.column_end - tile_.column;
    const int count = tile_.column_end < width ? own + 1 : own;
    T* const nodes = nodes_of(row);
    for (int i = threadIdx.x; i < work_.classes * count; i += kThreads) {
      const int c = i / count, n = i % count;
      T& value = nodes[c * memory_.column_nodes + n];
      if (n < own) {
        const int64_t plane = tile_.image * work_.classes + c;
        work_.gradient[(plane * height + row) * width + tile_.column + n] = value;
      } else {
        overlap(c)[row - tile_.row] = value;
      }
      value = T(0);
    }
    __syncthreads();
  }

  __device__ void write_overlap_row() {
    const T* const nodes = nodes_of(tile_.row_end);
    for (int i = threadIdx.x; i < work_.classes * memory_.column_nodes; i += kThreads) {
      const int c = i / memory_.column_nodes, n = i % memory_.column_nodes;
      overlap(c)[work_.tiling.rows + n] = nodes[i];
    }
  }

  __device__ T* overlap(int c) const {
    return work_.overlap + (int64_t(blockIdx.x) * work_.classes + c) * overlap_size(work_.tiling);
  }

  struct NoLabel {
    __device__ NoLabel(const Fusion<T>&, int, const Group&) {}
  };

  const LossWork<T>& work_;
  const Group group_;
  const LossMemory<T> memory_;
  const Tile tile_;
  Column<T> student_;
  std::conditional_t<kLabel == Label::fused, FusedLabel<T>, NoLabel> label_;
  T sum_[kSlots<T>],
      below_[kSlots<T>];  // gradient of the column in this row of cells, and its share of the nodes below
  int x_ = 0;
  bool counts_ = false;
};

template <class T, Label kLabel>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) loss_kernel(const __grid_constant__ LossWork<T> work) {
  Shared shared(psf_shared_memory);
  LossTile<T, kLabel>(work, shared).run();
}

}  // namespace psf::cuda
