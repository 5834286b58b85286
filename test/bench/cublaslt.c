// A libcublasLt for tests: it computes on memory that the host sees, the emulator's, and refuses whatever the real one
// would: wrong sizes of attributes, leading dimensions, types, an algorithm that it did not give. With cublasLt.h
// (WITH_HEADER) its functions and numbers are checked against that; else they are as below. CUBLASLT_FAKE=none: it knows
// no algorithm; =fail: products fail.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef WITH_HEADER
#include <cublasLt.h>
#else
typedef int cublasStatus_t, cublasComputeType_t, cudaDataType, cublasLtMatrixLayoutAttribute_t;
typedef int cublasLtMatmulDescAttributes_t, cublasLtMatmulPreferenceAttributes_t;
typedef void *cublasLtHandle_t, *cudaStream_t;
typedef struct {
  uint64_t data[8];
} cublasLtMatrixLayoutOpaque_t, cublasLtMatmulAlgo_t, cublasLtMatmulPreferenceOpaque_t;
typedef struct {
  uint64_t data[32];
} cublasLtMatmulDescOpaque_t;
typedef cublasLtMatrixLayoutOpaque_t* cublasLtMatrixLayout_t;
typedef cublasLtMatmulDescOpaque_t* cublasLtMatmulDesc_t;
typedef cublasLtMatmulPreferenceOpaque_t* cublasLtMatmulPreference_t;
typedef struct {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
  cublasStatus_t state;
  float wavesCount;
  int reserved[4];
} cublasLtMatmulHeuristicResult_t;
enum { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_EXECUTION_FAILED = 13 };
enum { CUDA_R_32F = 0, CUDA_R_16BF = 14, CUBLAS_COMPUTE_32F = 68, CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };
enum { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1 };
#endif

#define REFUSE_UNLESS(condition) \
  if (!(condition)) return CUBLAS_STATUS_INVALID_VALUE

// What the opaque structures hold here.
typedef struct {
  int64_t type, rows, columns, leading;
} Layout;
typedef struct {
  int32_t transpose[2];
} Desc;

static const uint64_t kSecret = 0x5eed, kWorkspace = 1 << 20;

static int fake_is(const char* value) {
  const char* given = getenv("CUBLASLT_FAKE");
  return given && strcmp(given, value) == 0;
}

size_t cublasLtGetVersion(void) { return 120405; }

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_INVALID_VALUE ? "an unsupported value" : "the fake failed";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = calloc(1, 8);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  free(handle);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* desc, cublasComputeType_t compute, cudaDataType scale) {
  REFUSE_UNLESS(compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F);
  *desc = calloc(1, sizeof(**desc));
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) {
  free(desc);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t bytes) {
  REFUSE_UNLESS(bytes == sizeof(int32_t));
  REFUSE_UNLESS(attribute == CUBLASLT_MATMUL_DESC_TRANSA || attribute == CUBLASLT_MATMUL_DESC_TRANSB);
  const int32_t transpose = *(const int32_t*)value;
  REFUSE_UNLESS(transpose == CUBLAS_OP_N || transpose == CUBLAS_OP_T);
  ((Desc*)desc)->transpose[attribute == CUBLASLT_MATMUL_DESC_TRANSB] = transpose;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows,
                                          uint64_t columns, int64_t leading) {
  REFUSE_UNLESS((type == CUDA_R_32F || type == CUDA_R_16BF) && leading >= (int64_t)rows);
  const Layout made = {type, (int64_t)rows, (int64_t)columns, leading};
  *layout = calloc(1, sizeof(**layout));
  memcpy(*layout, &made, sizeof(made));
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  free(layout);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = calloc(1, sizeof(**preference));
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  free(preference);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                    size_t bytes) {
  REFUSE_UNLESS(attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES && bytes == sizeof(uint64_t));
  preference->data[0] = *(const uint64_t*)value;
  return CUBLAS_STATUS_SUCCESS;
}

// op(a) (m,k), op(b) (k,n), c and d (m,n), of one type.
static int fit(cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a_, cublasLtMatrixLayout_t b_,
               cublasLtMatrixLayout_t c_, cublasLtMatrixLayout_t d_) {
  const Layout *a = (Layout*)a_, *b = (Layout*)b_, *c = (Layout*)c_, *d = (Layout*)d_;
  const int32_t* transpose = ((Desc*)desc)->transpose;
  const int64_t m = transpose[0] ? a->columns : a->rows, a_k = transpose[0] ? a->rows : a->columns;
  const int64_t n = transpose[1] ? b->rows : b->columns, b_k = transpose[1] ? b->columns : b->rows;
  return a->type == d->type && b->type == d->type && c->type == d->type && a_k == b_k && d->rows == m &&
         d->columns == n && memcmp(c, d, sizeof(*d)) == 0;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int most,
                                              cublasLtMatmulHeuristicResult_t results[], int* found) {
  REFUSE_UNLESS(handle && most >= 1 && fit(desc, a, b, c, d));
  *found = preference->data[0] >= kWorkspace && !fake_is("none");
  results[0].algo.data[7] = kSecret;
  results[0].workspaceSize = kWorkspace;
  results[0].state = CUBLAS_STATUS_SUCCESS;
  return CUBLAS_STATUS_SUCCESS;
}

static float get(const void* matrix, const Layout* layout, int64_t row, int64_t column) {
  const int64_t at = column * layout->leading + row;
  if (layout->type == CUDA_R_32F) return ((const float*)matrix)[at];
  const uint32_t bits = (uint32_t)((const uint16_t*)matrix)[at] << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static void put(void* matrix, const Layout* layout, int64_t row, int64_t column, float value) {
  const int64_t at = column * layout->leading + row;
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  if (layout->type == CUDA_R_32F) ((float*)matrix)[at] = value;
  else ((uint16_t*)matrix)[at] = (uint16_t)(bits >> 16);  // the tests' products are exact
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t desc, const void* alpha, const void* a,
                              cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                              const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
  if (fake_is("fail")) return CUBLAS_STATUS_EXECUTION_FAILED;
  REFUSE_UNLESS(handle && stream && fit(desc, a_layout, b_layout, c_layout, d_layout) && c == d);
  REFUSE_UNLESS(algorithm->data[7] == kSecret && workspace && workspace_bytes >= kWorkspace);
  REFUSE_UNLESS(*(const float*)alpha == 1 && *(const float*)beta == 0);
  const Layout *x = (Layout*)a_layout, *y = (Layout*)b_layout, *z = (Layout*)d_layout;
  const int32_t* transpose = ((Desc*)desc)->transpose;
  const int64_t inner = transpose[0] ? x->rows : x->columns;
  for (int64_t i = 0; i < z->rows; i++)
    for (int64_t j = 0; j < z->columns; j++) {
      double sum = 0;
      for (int64_t l = 0; l < inner; l++)
        sum += (double)(transpose[0] ? get(a, x, l, i) : get(a, x, i, l)) *
               (transpose[1] ? get(b, y, j, l) : get(b, y, l, j));
      put(d, z, i, j, (float)sum);
    }
  return CUBLAS_STATUS_SUCCESS;
}
