// What the environment can ask of the emulator: orders, threads, barriers left out one at a time, the access lint. The
// program runs itself again with each setting.
#include <algorithm>
#include <filesystem>
#include <unistd.h>

#include "check.h"
#include "simt/race.h"

namespace {

constexpr int kThreads = 64, kBlocks = 40;

struct Smem {
  float a[kThreads * 32];
  REDZONE(after_a);
  float b[kThreads];
};

// Every barrier is needed here: y = the sum of a row after a transposition in shared memory, twice.
__global__ void needed_kernel(const float* x, float* y) {
  auto& smem = dyn_smem<Smem>();
  const int i = static_cast<int>(threadIdx.x), lane = lane_index();
  const float* own = x + blockIdx.x * kThreads;
  for (int round = 0; round < 2; round++) {
    cp_async_4(&smem.b[i], own + i);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    smem.a[i] = smem.b[kThreads - 1 - i];
    __syncwarp();
    const float next = smem.a[i / 32 * 32 + (lane + 1) % 32];
    named_barrier(1, kThreads);
    smem.a[(i + 32) % kThreads] = next;
    __syncthreads();
    y[blockIdx.x * kThreads + i] = smem.a[i];
  }
}

// Shared memory by columns: all lanes of a warp in one bank. Device memory one element in 32 bytes.
__global__ void slow_kernel(const float* x, float* y) {
  auto& smem = dyn_smem<Smem>();
  const int i = static_cast<int>(threadIdx.x);
  smem.a[i * 32] = x[i];
  __syncthreads();
  y[i * 8] = smem.a[i * 32];
}

bool run_needed() {
  std::vector<float> x(kBlocks * kThreads);
  for (size_t i = 0; i < x.size(); i++) x[i] = static_cast<float>(i * 37 % 101);
  const Array<float> dx(x), dy(x.size());
  launch({kBlocks, kThreads, sizeof(Smem), nullptr}, needed_kernel, dx.get(), dy.get());
  const std::vector<float> y = dy.values();
  bool right = true;
  for (size_t i = 0; i < x.size(); i++) {
    const size_t block = i / kThreads * kThreads, from = (i % kThreads + 32) % kThreads;
    const size_t next = from / 32 * 32 + (from % 32 + 1) % 32;
    right &= y[i] == x[block + kThreads - 1 - next];
  }
  return right;
}

bool run_slow() {
  const Array<float> x(std::vector<float>(32, 1.0f)), y(32 * 8);
  launch({1, 32, sizeof(Smem), nullptr}, slow_kernel, x.get(), y.get());
  return true;
}

// This program, once more: "right", "wrong" or the message.
std::string again(const std::string& settings, const char* kernel) {
  char self[4096];
  const ssize_t length = readlink("/proc/self/exe", self, sizeof(self) - 1);
  self[std::max<ssize_t>(length, 0)] = 0;
  std::string text;
  if (FILE* pipe = popen((settings + " '" + self + "' " + kernel).c_str(), "r")) {
    char line[1024];
    while (std::fgets(line, sizeof(line), pipe)) text += line;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

std::string content(const std::string& path) {
  std::string text;
  if (FILE* file = std::fopen(path.c_str(), "r")) {
    char part[1024];
    for (size_t n; (n = std::fread(part, 1, sizeof(part), file)) > 0;) text.append(part, n);
    std::fclose(file);
  }
  return text;
}

void test_settings() {
  for (const char* settings : {"ROPEWALK_SIMT_ORDER=forward", "ROPEWALK_SIMT_ORDER=reverse",
                               "ROPEWALK_SIMT_ORDER=random", "ROPEWALK_SIMT_ORDER=random:7", "ROPEWALK_SIMT_THREADS=3",
                               "ROPEWALK_SIMT_THREADS=2 ROPEWALK_SIMT_ORDER=random:8"}) {
    const std::string found = again(settings, "needed");
    verify(found == "right", std::string(settings) + ": " + found);
  }
  const std::string refused = again("ROPEWALK_SIMT_ORDER=sideways", "needed");
  verify(refused.find("can be forward, reverse") != std::string::npos, "an unknown order: " + refused);
}

void test_mutations(const std::string& folder) {
  const std::string list = folder + "/sites";
  verify(again("ROPEWALK_SIMT_SITES='" + list + "'", "needed") == "right", "barriers are listed");
  const std::string sites = content(list);
  const auto count = static_cast<int>(std::count(sites.begin(), sites.end(), '\n'));
  verify(count == 5, "five barriers are listed, not " + std::to_string(count) + ":\n" + sites);
  verify(sites.find("1 needed_kernel cp.async.wait_group ") == 0, "the first of them is the wait: " + sites);
  for (int i = 1; i <= count; i++) {
    const std::string found = again("ROPEWALK_SIMT_SKIP=" + std::to_string(i), "needed");
    std::printf("without barrier %d: %s\n", i, found.c_str());
    if (simt::instrumented)
      verify(found != "right", "nobody misses barrier " + std::to_string(i));
    else
      skipped++;
  }
  verify(again("ROPEWALK_SIMT_SKIP=" + std::to_string(count + 1), "needed") == "right", "there is no sixth");
}

void test_lint(const std::string& folder) {
  if (!simt::instrumented) {
    skipped++;
    return;
  }
  const std::string path = folder + "/lint.json";
  verify(again("ROPEWALK_SIMT_LINT='" + path + "'", "slow") == "right", "the lint runs");
  const std::string found = content(path);
  const auto has = [&](const char* memory, const char* kind, const char* figures) {
    verify(found.find(std::string("\"memory\": \"") + memory + "\", \"kind\": \"" + kind + "\", " + figures) !=
               std::string::npos,
           std::string(memory) + " " + kind + " should be " + figures + " in\n" + found);
  };
  has("shared", "store", "\"requests\": 1, \"needed\": 1.000, \"actual\": 32.000");
  has("shared", "load", "\"requests\": 1, \"needed\": 1.000, \"actual\": 32.000");
  has("device", "load", "\"requests\": 1, \"needed\": 4.000, \"actual\": 4.000");
  has("device", "store", "\"requests\": 1, \"needed\": 4.000, \"actual\": 32.000");
  again("ROPEWALK_SIMT_LINT='" + folder + "/lint.txt'", "slow");
  verify(content(folder + "/lint.txt").find("32.00  shared store  slow_kernel modes_test.cu:") != std::string::npos,
         "as a table:\n" + content(folder + "/lint.txt"));
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1) try {
      const bool slow = std::string(arguments[1]) == "slow";
      std::printf("%s\n", (slow ? run_slow() : run_needed()) ? "right" : "wrong");
      return 0;
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
      return 0;
    }
  std::string folder = (std::filesystem::temp_directory_path() / "ropewalk-simt-XXXXXX").string();
  if (!mkdtemp(folder.data())) return 1;
  test_settings();
  test_mutations(folder);
  test_lint(folder);
  for (const char* name : {"/sites", "/lint.json", "/lint.txt"}) unlink((folder + name).c_str());
  rmdir(folder.c_str());
  return summary("modes_test");
}
