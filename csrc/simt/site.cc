// Places in the source of the kernels: what a code address means, which barrier it is, and how the environment wants
// threads to run.
#include <link.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

#include "fiber.h"

namespace simt {

SIMT_THREAD int quiet = 0;

namespace {

std::mutex mutex;

struct Module {
  std::string path;
  const char* bias = nullptr;  // where it was loaded, less the address it was linked for
  struct Range {
    const char *begin, *end;
  };
  std::vector<Range> constants;
};

// The library or program that the kernels and this file are in.
const Module& module() {
  static const Module found = [] {
    Module result;
    dl_iterate_phdr(
        [](dl_phdr_info* object, size_t, void* data) {
          auto* to = static_cast<Module*>(data);
          const auto* bias = reinterpret_cast<const char*>(object->dlpi_addr);
          const auto* here = reinterpret_cast<const char*>(&mutex);
          const auto begin = [&](int i) { return bias + object->dlpi_phdr[i].p_vaddr; };
          const auto end = [&](int i) { return begin(i) + object->dlpi_phdr[i].p_memsz; };
          bool ours = false;
          for (int i = 0; i < object->dlpi_phnum; i++)
            ours |= object->dlpi_phdr[i].p_type == PT_LOAD && here >= begin(i) && here < end(i);
          if (!ours) return 0;
          to->bias = bias;
          to->path = object->dlpi_name;
          for (int i = 0; i < object->dlpi_phnum; i++) {
            const auto& segment = object->dlpi_phdr[i];
            if ((segment.p_type == PT_LOAD && !(segment.p_flags & PF_W)) || segment.p_type == PT_GNU_RELRO)
              to->constants.push_back({begin(i), end(i)});
          }
          return 1;
        },
        &result);
    char self[4096];
    const ssize_t length = readlink("/proc/self/exe", self, sizeof(self));
    if (result.path.empty() && length > 0) result.path.assign(self, static_cast<size_t>(length));
    return result;
  }();
  return found;
}

// What addr2line prints for an address: pairs of lines, the function and the place, innermost inlined function first.
std::vector<std::string> look_up(const void* address) {
  const Module& own = module();
  char command[1024];
  snprintf(command, sizeof(command), "addr2line -Cfie '%s' 0x%zx 2>/dev/null", own.path.c_str(),
           static_cast<size_t>(static_cast<const char*>(address) - own.bias));
  std::vector<std::string> lines;
  if (FILE* pipe = popen(command, "r")) {
    char line[4096];
    while (fgets(line, sizeof(line), pipe)) lines.emplace_back(line, strcspn(line, "\n"));
    pclose(pipe);
  }
  return lines;
}

// "/a/b/c.cu:12 (discriminator 3)" -> "c.cu:12"
std::string file_and_line(const std::string& text) {
  const size_t slash = text.rfind('/');
  std::string name = slash == std::string::npos ? text : text.substr(slash + 1);
  return name.substr(0, name.find(" (discriminator"));
}

}  // namespace

std::string describe_site(const void* site) {
  const Quiet silence;
  const std::lock_guard<std::mutex> lock(mutex);
  static std::map<const void*, std::string> known;
  const auto found = known.find(site);
  if (found != known.end()) return found->second;
  // A return address is that of the next instruction.
  const std::vector<std::string> lines = look_up(static_cast<const char*>(site) - 1);
  std::string text, hidden;
  int places = 0;
  for (size_t i = 1; i < lines.size() && places < 4; i += 2) {
    const std::string place = file_and_line(lines[i]);
    if (place.rfind("??", 0) == 0) continue;
    // How the emulator came to call the kernel, and what stands for an instruction of CUDA.
    const bool own = lines[i].find("/csrc/simt/") != std::string::npos ||
                     lines[i].find("/../simt/") != std::string::npos || lines[i].find("/c++/") != std::string::npos ||
                     lines[i - 1].find("::launch<") != std::string::npos;
    if (own)
      hidden = place;
    else
      text += (places++ ? " from " : "") + place;
  }
  if (text.empty()) text = hidden;
  if (text.empty()) {
    char address[32];
    snprintf(address, sizeof(address), "%p", site);
    text = address;
  }
  return known[site] = text;
}

std::string describe_function(const void* address) {
  const Quiet silence;
  const std::lock_guard<std::mutex> lock(mutex);
  static std::map<const void*, std::string> known;
  const auto found = known.find(address);
  if (found != known.end()) return found->second;
  const std::vector<std::string> lines = look_up(address);
  std::string name = lines.size() < 2 ? "a kernel" : lines[lines.size() - 2];
  // "void rw::cuda::(anonymous namespace)::add_kernel<float>(float*)" -> "add_kernel"
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  name = name.substr(0, name.find_first_of("<("));
  name = name.substr(name.find_last_of(" :") + 1);
  return known[address] = name;
}

bool same_site(const void* a, const void* b) { return a == b || describe_site(a) == describe_site(b); }

bool is_constant(const void* p, size_t bytes) {
  const auto* at = static_cast<const char*>(p);
  for (const auto& range : module().constants)
    if (at >= range.begin && at + bytes <= range.end) return true;
  return false;
}

bool skipped(const char* what, const void* site) {
  const int wanted = block->settings->skip;
  const char* const list = block->settings->sites;
  if (!wanted && !list) return false;
  const Quiet silence;
  static std::map<std::pair<const void*, const void*>, int> by_address;
  static std::map<std::string, int> by_name;
  const auto key = std::make_pair(block->kernel, site);
  static std::mutex numbers;
  std::unique_lock<std::mutex> lock(numbers);
  auto found = by_address.find(key);
  if (found == by_address.end()) {
    const std::string name = describe_function(block->kernel) + " " + what + " " + describe_site(site);
    const auto [entry, added] = by_name.emplace(name, static_cast<int>(by_name.size()) + 1);
    found = by_address.emplace(key, entry->second).first;
    if (added && list)
      if (FILE* file = fopen(list, entry->second == 1 ? "w" : "a")) {
        fprintf(file, "%d %s\n", entry->second, name.c_str());
        fclose(file);
      }
  }
  return found->second == wanted;
}

Settings read_settings() {
  Settings settings;
  if (const char* order = std::getenv("ROPEWALK_SIMT_ORDER")) {
    if (strcmp(order, "reverse") == 0)
      settings.order = Order::reverse;
    else if (strncmp(order, "random", 6) == 0) {
      settings.order = Order::random;
      if (order[6] == ':') settings.seed = strtoull(order + 7, nullptr, 10);
    } else if (strcmp(order, "forward") != 0)
      throw std::runtime_error(std::string("ROPEWALK_SIMT_ORDER is \"") + order +
                               "\"; it can be forward, reverse, random or random:<seed>");
  }
  if (const char* threads = std::getenv("ROPEWALK_SIMT_THREADS")) settings.threads = std::max(1, atoi(threads));
  if (const char* skip = std::getenv("ROPEWALK_SIMT_SKIP")) settings.skip = atoi(skip);
  settings.sites = std::getenv("ROPEWALK_SIMT_SITES");
  return settings;
}

}  // namespace simt
