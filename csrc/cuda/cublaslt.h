// cuBLASLt as a peer of `ropewalk bench`: opened at run time where it is installed; nothing else uses it. The few of
// its functions and numbers that this takes are declared here, as in cublasLt.h of CUDA 12.4 (they are the same in 13),
// so that building needs no cuBLAS. For backend.cu.
//
// It thinks in columns: a matrix of ours, (r,c) in rows, is one of (c,r) in columns with r and c, and the leading
// dimension, as they are. So c (m,n) = a b is computed as c^T (n,m) = b^T a^T.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include <dlfcn.h>

#include "../backend.h"
#include "device.h"

namespace rw::cuda {

class Cublaslt {
 public:
  // `path`, or the usual names where it is empty. The library stays open: it has threads of its own.
  explicit Cublaslt(const std::string& path) {
    std::vector<std::string> names = {path};
    if (path.empty()) names = {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"};
    void* library = nullptr;
    for (size_t i = 0; i < names.size() && !library; i++) {
      library = dlopen(names[i].c_str(), RTLD_NOW | RTLD_LOCAL);
      name_ = names[i];
    }
    if (!library) throw std::runtime_error(path.empty() ? "it is not installed" : dlerror());
    find(library, get_version_, "cublasLtGetVersion");
    find(library, status_text_, "cublasLtGetStatusString");
    find(library, create_, "cublasLtCreate");
    find(library, destroy_, "cublasLtDestroy");
    find(library, desc_create_, "cublasLtMatmulDescCreate");
    find(library, desc_set_, "cublasLtMatmulDescSetAttribute");
    find(library, desc_destroy_, "cublasLtMatmulDescDestroy");
    find(library, layout_create_, "cublasLtMatrixLayoutCreate");
    find(library, layout_destroy_, "cublasLtMatrixLayoutDestroy");
    find(library, preference_create_, "cublasLtMatmulPreferenceCreate");
    find(library, preference_set_, "cublasLtMatmulPreferenceSetAttribute");
    find(library, preference_destroy_, "cublasLtMatmulPreferenceDestroy");
    find(library, choose_, "cublasLtMatmulAlgoGetHeuristic");
    find(library, matmul_, "cublasLtMatmul");
    Object handle;
    expect(create_(&handle), "cublasLtCreate");
    handle_ = {handle, destroy_};
    const size_t version = get_version_();  // 120405 is 12.4.5
    description_ = "cuBLASLt " + std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
                   std::to_string(version % 100) + " (" + name_ + ")";
  }

  const std::string& description() const { return description_; }

  // Submits c = a b `repeats` times; `matrices` has a, b, c of each of the `sets`, which are used in turn.
  void multiply(Context& context, const rw_product& product, void* const* matrices, size_t sets, size_t repeats) {
    if (!prepared_ || !same(product, prepared_->product)) prepared_ = std::make_unique<Prepared>(prepare(product));
    const Prepared& p = *prepared_;
    const float one = 1, zero = 0;
    void* const workspace = context.scratch(kWorkspace);
    for (size_t i = 0; i < repeats; i++) {
      void* const* set = matrices + 3 * (i % sets);
      expect(matmul_(handle_.get(), p.desc.get(), &one, set[1], p.b.get(), set[0], p.a.get(), &zero, set[2], p.c.get(),
                     set[2], p.c.get(), &p.choice.algorithm, workspace, kWorkspace, context.stream),
             "cublasLtMatmul");
    }
  }

 private:
  using Object = void*;  // its handles, all opaque
  using Status = int;    // 0 for success
  using Destroy = Status (*)(Object);
  using Owner = std::unique_ptr<void, Destroy>;

  struct Algorithm {
    uint64_t data[8];
  };
  struct Choice {
    Algorithm algorithm;
    size_t workspace;
    Status status;
    float waves;
    int reserved[4];
  };
  static_assert(sizeof(Choice) == 96, "cublasLtMatmulHeuristicResult_t");

  static constexpr int kFloat = 0, kBfloat16 = 14;                 // CUDA_R_32F, CUDA_R_16BF
  static constexpr int kComputeFloat = 68;                         // CUBLAS_COMPUTE_32F: f32 without tf32
  static constexpr int kNotTransposed = 0, kTransposed = 1;        // CUBLAS_OP_N, CUBLAS_OP_T
  static constexpr int kTransposeFirst = 3, kTransposeSecond = 4;  // CUBLASLT_MATMUL_DESC_TRANSA, _TRANSB
  static constexpr int kMostWorkspace = 1;                         // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
  // What NVIDIA recommends for Hopper; older cards take less of it.
  static constexpr uint64_t kWorkspace = uint64_t{32} << 20;

  struct Prepared {
    rw_product product;
    Owner desc, a, b, c;
    Choice choice;
  };

  static bool same(const rw_product& x, const rw_product& y) {
    return x.dtype == y.dtype && x.transpose_a == y.transpose_a && x.transpose_b == y.transpose_b && x.m == y.m &&
           x.n == y.n && x.k == y.k;
  }

  Prepared prepare(const rw_product& product) {
    const auto& [dtype, transpose_a, transpose_b, m, n, k] = product;
    const int type = static_cast<DType>(dtype) == DType::bf16 ? kBfloat16 : kFloat;
    // A matrix of `rows` and `columns` in our order.
    const auto layout = [&, type = type](int64_t rows, int64_t columns) {
      Object made;
      expect(layout_create_(&made, type, static_cast<uint64_t>(columns), static_cast<uint64_t>(rows), columns),
             "cublasLtMatrixLayoutCreate");
      return Owner(made, layout_destroy_);
    };
    Object made;
    expect(desc_create_(&made, kComputeFloat, kFloat), "cublasLtMatmulDescCreate");
    Owner desc(made, desc_destroy_);
    // Its first operand is our second one.
    const int first = transpose_b ? kTransposed : kNotTransposed, second = transpose_a ? kTransposed : kNotTransposed;
    expect(desc_set_(desc.get(), kTransposeFirst, &first, sizeof(first)), "cublasLtMatmulDescSetAttribute");
    expect(desc_set_(desc.get(), kTransposeSecond, &second, sizeof(second)), "cublasLtMatmulDescSetAttribute");
    Owner a = transpose_a ? layout(k, m) : layout(m, k), b = transpose_b ? layout(n, k) : layout(k, n);
    Owner c = layout(m, n);
    expect(preference_create_(&made), "cublasLtMatmulPreferenceCreate");
    const Owner preference(made, preference_destroy_);
    expect(preference_set_(preference.get(), kMostWorkspace, &kWorkspace, sizeof(kWorkspace)),
           "cublasLtMatmulPreferenceSetAttribute");
    Choice choice = {};
    int found = 0;
    expect(choose_(handle_.get(), desc.get(), b.get(), a.get(), c.get(), c.get(), preference.get(), 1, &choice, &found),
           "cublasLtMatmulAlgoGetHeuristic");
    if (found < 1) throw std::runtime_error("cuBLASLt knows no algorithm for this product");
    expect(choice.status, "cublasLtMatmulAlgoGetHeuristic");
    return {product, std::move(desc), std::move(a), std::move(b), std::move(c), choice};
  }

  template <typename Function>
  void find(void* library, Function& function, const char* symbol) {
    function = reinterpret_cast<Function>(dlsym(library, symbol));
    if (!function) throw std::runtime_error(name_ + " has no " + symbol);
  }

  void expect(Status status, const char* what) const {
    if (status != 0) throw std::runtime_error(std::string(what) + " failed: " + status_text_(status));
  }

  std::string name_, description_;
  size_t (*get_version_)();
  const char* (*status_text_)(Status);
  Status (*create_)(Object*);
  Destroy destroy_, desc_destroy_, layout_destroy_, preference_destroy_;
  Status (*desc_create_)(Object*, int compute, int scale);
  Status (*desc_set_)(Object, int attribute, const void* value, size_t bytes);
  Status (*layout_create_)(Object*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  Status (*preference_create_)(Object*);
  Status (*preference_set_)(Object, int attribute, const void* value, size_t bytes);
  Status (*choose_)(Object handle, Object desc, Object a, Object b, Object c, Object d, Object preference, int most,
                    Choice* choices, int* found);
  Status (*matmul_)(Object handle, Object desc, const void* alpha, const void* a, Object a_layout, const void* b,
                    Object b_layout, const void* beta, const void* c, Object c_layout, void* d, Object d_layout,
                    const Algorithm* algorithm, void* workspace, size_t bytes, cudaStream_t stream);
  Owner handle_{nullptr, nullptr};
  std::unique_ptr<Prepared> prepared_;
};

}  // namespace rw::cuda
