// See gloo_headers/README.md.
#pragma once
namespace gloo {
namespace transport {
struct Device {
  virtual ~Device() = 0;
};
struct UnboundBuffer {
  virtual ~UnboundBuffer() = 0;
};
}  // namespace transport
}  // namespace gloo
