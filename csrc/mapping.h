// A file's bytes used where the page cache holds them: read-only, and without a copy in memory of one's own.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace rw {

// A file that is used in place is no longer what it was.
struct FileChanged : std::runtime_error {
  explicit FileChanged(const std::string& path)
      : std::runtime_error(path +
                           " changed (or was truncated) while the model was using it; results cannot be trusted: load "
                           "the model again, or load it with map: false") {}
};

// By which a change of a file is known.
struct FileStamp {
  uint64_t bytes = 0;
  int64_t seconds = 0;
  uint32_t nanoseconds = 0;
};

struct MappingSlot;

class Mapping {
 public:
  // The whole file; nothing where it cannot be mapped. `fd` may be closed afterwards, `path` is for messages.
  static std::unique_ptr<Mapping> open(int fd, std::string path);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const std::string& path() const { return path_; }
  char* data() const { return data_; }
  size_t bytes() const { return stamp_.bytes; }

  // To be called after every use: throws FileChanged where what was read may not be what was in the file when it was
  // mapped. A file that was replaced by another one of its name has not changed: its bytes stay until they are
  // unmapped.
  void check() const;

 private:
  Mapping() = default;

  std::string path_;
  FileStamp stamp_;
  int fd_ = -1;
  char* data_ = nullptr;
  MappingSlot* slot_ = nullptr;
};

}  // namespace rw
