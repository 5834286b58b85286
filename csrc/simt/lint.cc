#include "lint.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <tuple>
#include <unordered_map>

namespace simt {
namespace {

// The k-th execution of an instruction by the lanes of a warp is one request: lanes run one after the other here.
struct Request {
  uint32_t lanes = 0;
  size_t bytes = 0;
  const char* at[32];
};

struct Instruction {
  const void* site;
  bool writes, shared;
  size_t executed[32] = {};
  size_t done = 0;  // requests that have been counted and left `open`
  std::vector<Request> open;
};

struct Total {
  uint64_t requests = 0, cost = 0, needed = 0;
};

struct Line {
  std::string kernel, place;
  bool writes, shared;
  bool operator<(const Line& other) const {
    return std::tie(kernel, place, writes, shared) < std::tie(other.kernel, other.place, other.writes, other.shared);
  }
};

struct Address {
  const void *kernel, *site;
  bool writes, shared;
  bool operator<(const Address& other) const {
    return std::tie(kernel, site, writes, shared) < std::tie(other.kernel, other.site, other.writes, other.shared);
  }
};

std::map<Address, Total>& totals() {
  static std::map<Address, Total> all;
  return all;
}
// Of the running block, by site and kind: cp.async is two instructions.
std::vector<std::unordered_map<uintptr_t, Instruction>> warps;

// Shared memory serves 32 words of 4 bytes in 32 banks at a time; 8-byte requests go by halves of a warp, those of 16
// bytes by quarters.
void count_shared(const Request& request, Total& total) {
  const int phases = request.bytes <= 4 ? 1 : request.bytes <= 8 ? 2 : 4, width = 32 / phases;
  for (int phase = 0; phase < phases; phase++) {
    std::vector<uintptr_t> words;
    for (int lane = phase * width; lane < (phase + 1) * width; lane++)
      if (request.lanes & 1u << lane)
        for (size_t i = 0; i < std::max(request.bytes, size_t{4}); i += 4)
          words.push_back((reinterpret_cast<uintptr_t>(request.at[lane]) + i) / 4);
    if (words.empty()) continue;
    std::sort(words.begin(), words.end());
    words.erase(std::unique(words.begin(), words.end()), words.end());
    uint64_t banks[32] = {};
    for (const uintptr_t word : words) banks[word % 32]++;
    total.cost += *std::max_element(banks, banks + 32);
    total.needed++;
  }
}

void count_device(const Request& request, Total& total) {
  constexpr uintptr_t kSector = 32;
  std::vector<uintptr_t> sectors, bytes;
  for (int lane = 0; lane < 32; lane++) {
    if (!(request.lanes & 1u << lane)) continue;
    const auto at = reinterpret_cast<uintptr_t>(request.at[lane]);
    for (uintptr_t s = at / kSector; s <= (at + request.bytes - 1) / kSector; s++) sectors.push_back(s);
    bytes.push_back(at);
  }
  const auto distinct = [](std::vector<uintptr_t>& x) {
    std::sort(x.begin(), x.end());
    return static_cast<uint64_t>(std::unique(x.begin(), x.end()) - x.begin());
  };
  total.cost += distinct(sectors);
  total.needed += (distinct(bytes) * request.bytes + kSector - 1) / kSector;
}

void count(const Instruction& instruction, const Request& request) {
  Total& total = totals()[{block->kernel, instruction.site, instruction.writes, instruction.shared}];
  total.requests++;
  instruction.shared ? count_shared(request, total) : count_device(request, total);
}

void write_report(const char* path) {
  std::map<Line, Total> lines;
  for (const auto& [address, total] : totals()) {
    Total& sum =
        lines[{describe_function(address.kernel), describe_site(address.site), address.writes, address.shared}];
    sum.requests += total.requests;
    sum.cost += total.cost;
    sum.needed += total.needed;
  }
  std::vector<std::pair<Line, Total>> sorted(lines.begin(), lines.end());
  std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) {
    return a.second.cost - a.second.needed > b.second.cost - b.second.needed;
  });
  FILE* file = fopen(path, "w");
  if (!file) return perror(path);
  const std::string name = path;
  const bool json = name.size() > 5 && name.compare(name.size() - 5, 5, ".json") == 0;
  fprintf(file,
          json ? "[" : "needed and actual: wavefronts of shared memory, 32-byte sectors of device memory, a request\n");
  if (!json) fprintf(file, "%10s %8s %8s %6s  %-13s %s\n", "requests", "needed", "actual", "ratio", "", "");
  const char* separator = "";
  for (const auto& [line, total] : sorted) {
    const auto requests = static_cast<double>(total.requests);
    const double needed = static_cast<double>(total.needed) / requests;
    const double actual = static_cast<double>(total.cost) / requests;
    const char* const memory = line.shared ? "shared" : "device";
    const char* const kind = line.writes ? "store" : "load";
    if (json)
      fprintf(file,
              "%s\n  {\"kernel\": \"%s\", \"place\": \"%s\", \"memory\": \"%s\", \"kind\": \"%s\", \"requests\": %llu, "
              "\"needed\": %.3f, \"actual\": %.3f}",
              separator, line.kernel.c_str(), line.place.c_str(), memory, kind,
              static_cast<unsigned long long>(total.requests), needed, actual);
    else
      fprintf(file, "%10llu %8.2f %8.2f %6.2f  %s %-6s %s %s\n", static_cast<unsigned long long>(total.requests),
              needed, actual, actual / needed, memory, kind, line.kernel.c_str(), line.place.c_str());
    separator = ",";
  }
  if (json) fprintf(file, "\n]\n");
  fclose(file);
}

// What it needs was made before it, and therefore lives longer.
struct AtExit {
  ~AtExit() {
    const char* path = std::getenv("ROPEWALK_SIMT_LINT");
    if (path && *path) write_report(path);
  }
};

}  // namespace

bool lint_wanted() {
  static const bool wanted = std::getenv("ROPEWALK_SIMT_LINT") != nullptr;
  return wanted;
}

void lint(const Thread& thread, const char* p, size_t bytes, bool writes, bool shared, const void* site) {
  static const AtExit at_exit = (totals(), describe_site(site), describe_function(block->kernel), AtExit{});
  if (warps.size() < block->warps.size()) warps.resize(block->warps.size());
  auto& instructions = warps[static_cast<size_t>(thread.warp)];
  const uintptr_t key = 4 * reinterpret_cast<uintptr_t>(site) + 2 * writes + shared;
  Instruction& instruction = instructions.try_emplace(key, Instruction{site, writes, shared, {}, 0, {}}).first->second;
  const size_t k = instruction.executed[thread.lane]++ - instruction.done;
  if (k >= instruction.open.size()) instruction.open.resize(k + 1);
  Request& request = instruction.open[k];
  request.lanes |= 1u << thread.lane;
  request.bytes = bytes;
  request.at[thread.lane] = p;
  size_t whole = 0;
  const uint32_t all = block->warps[static_cast<size_t>(thread.warp)].alive;
  while (whole < instruction.open.size() && instruction.open[whole].lanes == all)
    count(instruction, instruction.open[whole++]);
  instruction.open.erase(instruction.open.begin(), instruction.open.begin() + static_cast<std::ptrdiff_t>(whole));
  instruction.done += whole;
}

void lint_block_ends() {
  for (auto& instructions : warps) {
    for (const auto& [key, instruction] : instructions)
      for (const Request& request : instruction.open)
        if (request.lanes) count(instruction, request);
    instructions.clear();
  }
}

}  // namespace simt
