// See gloo_headers/README.md. The functions are those that c10d's GlooStore overrides.
#pragma once
#include <gloo/transport/device.h>

#include <chrono>
#include <string>
#include <vector>
namespace gloo {
namespace rendezvous {
struct Store {
  virtual ~Store();
  virtual void set(const std::string &key, const std::vector<char> &value) = 0;
  virtual std::vector<char> get(const std::string &key) = 0;
  virtual void wait(const std::vector<std::string> &keys) = 0;
  virtual void wait(const std::vector<std::string> &keys, const std::chrono::milliseconds &) = 0;
};
}  // namespace rendezvous
}  // namespace gloo
