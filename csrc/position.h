// Where an output pixel lies between the nodes of a low-resolution map, along one axis.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace psf {

// Nodes per output pixel, with the meaning of align_corners in torch.nn.functional.interpolate.
PSF_HOST_DEVICE inline double position_step(int64_t source, int64_t target, bool align_corners) {
  if (align_corners) return target > 1 ? double(source - 1) / double(target - 1) : 0.0;
  return double(source) / double(target);
}

// Output i = (1 - weight) node[low] + weight node[low + 1]; the weight is 0 where low is the last node.
struct Position {
  int64_t low;
  double weight;
  bool clamped;  // moved onto the first or the last node
};

// Computed in float64: float32 would be off by up to source * 2^-23 of a node's step.
PSF_HOST_DEVICE inline Position position_of(int64_t i, int64_t source, double step, bool align_corners) {
  const double given = align_corners ? double(i) * step : (double(i) + 0.5) * step - 0.5;
  const double last = double(source - 1);
  const double position = given < 0.0 ? 0.0 : given > last ? last : given;
  const int64_t low = int64_t(position);
  return {low, position - double(low), position != given};
}

}  // namespace psf
