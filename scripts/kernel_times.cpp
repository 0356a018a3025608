// Shows which kernels use the GPU time of a program. CUDA loads this library into a program if
// CUDA_INJECTION64_PATH names it. When the program ends, the library prints to stderr the times of
// the kernels in the last KERNEL_TIMES_MS milliseconds (500 by default), summed by name, and the
// times between two kernels in which no kernel ran, summed by their names. The kernels of a graph
// are counted one by one. scripts/kernel_times builds the library and runs a command with it.
#include <cupti.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <vector>

struct Kernel {
  uint64_t start, end;
  const std::string *name;
};
static std::vector<Kernel> kernels;
static std::map<std::string, int> names;
static std::mutex mutex;

static void CUPTIAPI request(uint8_t **buffer, size_t *size, size_t *max_records) {
  *size = 8 << 20;
  *buffer = (uint8_t *)aligned_alloc(8, *size);
  *max_records = 0;
}
static void CUPTIAPI completed(CUcontext, uint32_t, uint8_t *buffer, size_t, size_t valid) {
  std::lock_guard<std::mutex> lock(mutex);
  CUpti_Activity *record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) continue;
    auto kernel = (KERNEL_RECORD *)record;
    auto name = names.emplace(kernel->name ? kernel->name : "?", 0).first;
    kernels.push_back({kernel->start, kernel->end, &name->first});
  }
  free(buffer);
}
// Prints the sums of at least a thousandth of the window, the largest first.
static void print(const std::map<std::string, std::pair<double, int>> &sums, double window) {
  std::vector<std::pair<std::string, std::pair<double, int>>> rows(sums.begin(), sums.end());
  std::sort(rows.begin(), rows.end(), [](auto &a, auto &b) { return a.second.first > b.second.first; });
  for (auto &[name, sum] : rows)
    if (sum.first > window * 0.001)
      fprintf(stderr, "%6.2f %% %8.3f ms %6d x %8.1f us  %.170s\n", sum.first / window * 100, sum.first / 1e6,
              sum.second, sum.first / sum.second / 1e3, name.c_str());
}
static void report() {
  cuptiActivityFlushAll(1);
  std::lock_guard<std::mutex> lock(mutex);
  if (kernels.empty()) return;
  const char *wanted = getenv("KERNEL_TIMES_MS");
  const uint64_t window = (uint64_t)((wanted ? atof(wanted) : 500) * 1e6);
  uint64_t last = 0;
  for (auto &k : kernels) last = std::max(last, k.end);
  kernels.erase(std::remove_if(kernels.begin(), kernels.end(), [&](auto &k) { return k.start + window < last; }),
                kernels.end());
  std::sort(kernels.begin(), kernels.end(), [](auto &a, auto &b) { return a.start < b.start; });
  std::map<std::string, std::pair<double, int>> sums, gaps;
  auto add = [](auto &sums, const std::string &name, double time) {
    auto &sum = sums[name];
    sum.first += time, sum.second += 1;
  };
  double idle = 0;
  const Kernel *before = &kernels[0];  // the one that ends last so far
  for (auto &k : kernels) {
    add(sums, *k.name, (double)(k.end - k.start));
    if (k.start > before->end) {
      const double gap = (double)(k.start - before->end);
      add(gaps, before->name->substr(0, 80) + " -> " + k.name->substr(0, 80), gap);
      idle += gap;
    }
    if (k.end > before->end) before = &k;
  }
  fprintf(stderr, "kernels of the last %.0f ms: %zu, busy %.1f %%\n", window / 1e6, kernels.size(),
          100 - idle / window * 100);
  print(sums, window);
  fprintf(stderr, "idle %.1f %%\n", idle / window * 100);
  print(gaps, window);
}
extern "C" int InitializeInjection(void) {
  if (cuptiActivityRegisterCallbacks(request, completed) != CUPTI_SUCCESS) return 1;
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  atexit(report);
  return 1;
}
