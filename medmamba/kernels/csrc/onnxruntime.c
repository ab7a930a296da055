// The scan as a custom operator of ONNX Runtime. `SessionOptions.register_custom_ops_library(this library)` makes the
// nodes medmamba.Scan2D of an exported model run here, instead of as the function of standard operators that the model
// contains as a fallback.
//
// ONNX Runtime passes its C interface as a table of functions to which new ones are only ever appended. The functions
// used here are declared below by their position in that table, so the build needs no ONNX Runtime headers.
#if !defined(_WIN32)
#define _GNU_SOURCE
#endif
#include <stddef.h>
#include <stdint.h>

#include "pool.h"
#include "scan.h"

#if defined(_WIN32)
#include <windows.h>
#define EXPORT __declspec(dllexport)
#else
#include <dlfcn.h>
#include <unistd.h>
#define EXPORT __attribute__((visibility("default")))
#endif

int medmamba_best_variant(void);
int medmamba_scan_2d_forward(int variant, const Scan2d *a);

enum { API_VERSION = 20 };  // of onnxruntime 1.20
enum { FAIL = 1, INVALID_ARGUMENT = 2 };
enum { TENSOR_OF_FLOAT = 1 };

typedef struct Status Status;  // NULL: success
typedef struct Domain Domain;
typedef struct SessionOptions SessionOptions;
typedef struct Context Context;
typedef struct Value Value;
typedef struct Shape Shape;
typedef struct Operator Operator;

typedef struct {
    Status *(*CreateStatus)(int code, const char *text);  // 0
    void *unused_1[25];
    Status *(*CreateCustomOpDomain)(const char *name, Domain **);       // 26
    Status *(*CustomOpDomain_Add)(Domain *, const Operator *);          // 27
    Status *(*AddCustomOpDomain)(SessionOptions *, Domain *);           // 28
    void *unused_29[22];
    Status *(*GetTensorMutableData)(Value *, void **);  // 51
    void *unused_52[9];
    Status *(*GetDimensionsCount)(const Shape *, size_t *);       // 61
    Status *(*GetDimensions)(const Shape *, int64_t *, size_t);  // 62
    void *unused_63[2];
    Status *(*GetTensorTypeAndShape)(const Value *, Shape **);  // 65
    void *unused_66[24];
    Status *(*KernelContext_GetInput)(const Context *, size_t, const Value **);                    // 90
    Status *(*KernelContext_GetOutput)(Context *, size_t, const int64_t *, size_t rank, Value **);  // 91
    void *unused_92[7];
    void (*ReleaseTensorTypeAndShapeInfo)(Shape *);  // 99
    void *unused_100[174];
    Status *(*KernelContext_ParallelFor)(
        const Context *, void (*piece)(void *data, size_t i), size_t count, size_t batches, void *data);  // 274
} Api;
_Static_assert(offsetof(Api, KernelContext_ParallelFor) == 274 * sizeof(void *), "one of the gaps is wrong");

typedef struct {
    const Api *(*GetApi)(uint32_t version);
} ApiBase;

// The fields of OrtCustomOp, in its order; those that `scan_operator` does not set are optional.
struct Operator {
    uint32_t version;
    void *(*CreateKernel)(const Operator *, const Api *, const void *info);
    const char *(*GetName)(const Operator *);
    const char *(*GetExecutionProviderType)(const Operator *);
    int (*GetInputType)(const Operator *, size_t);
    size_t (*GetInputTypeCount)(const Operator *);
    int (*GetOutputType)(const Operator *, size_t);
    size_t (*GetOutputTypeCount)(const Operator *);
    void (*KernelCompute)(void *kernel, Context *);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const Operator *, size_t);
    int (*GetOutputCharacteristic)(const Operator *, size_t);
    int (*GetInputMemoryType)(const Operator *, size_t);
    int (*GetVariadic[4])(const Operator *);
    Status *(*CreateKernelV2)(const Operator *, const Api *, const void *info, void **kernel);
    Status *(*KernelComputeV2)(void *kernel, Context *);
    Status *(*InferOutputShape)(const Operator *, void *context);
    int (*GetStartVersion)(const Operator *);
    int (*GetEndVersion)(const Operator *);
    size_t (*GetMayInplace)(int **, int **);
    void (*ReleaseMayInplace)(int *, int *);
    size_t (*GetAliasMap)(int **, int **);
    void (*ReleaseAliasMap)(int *, int *);
};

// Number of pieces to cut the work into. More pieces than the session has threads cost little.
static int64_t processors(void) {
#if defined(_WIN32)
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    long count = (long)info.dwNumberOfProcessors;
#else
    long count = sysconf(_SC_NPROCESSORS_ONLN);
#endif
    return count < 1 ? 1 : count > 64 ? 64 : count;
}

typedef struct {
    const Api *api;
    const Context *context;
} Host;

static void run_in_host(void *host, void (*piece)(void *data, size_t i), size_t count, void *data) {
    const Host *h = host;
    h->api->KernelContext_ParallelFor(h->context, piece, count, 0, data);
}

// Returns from the enclosing function if the call fails.
#define TRY(call)                        \
    do {                                 \
        Status *status_ = (call);        \
        if (status_) return status_;     \
    } while (0)

static Status *read_tensor(const Api *api, const Value *value, size_t rank, int64_t *shape, void **data) {
    Shape *info;
    size_t count;
    TRY(api->GetTensorTypeAndShape(value, &info));
    Status *status = api->GetDimensionsCount(info, &count);
    if (!status && count != rank) status = api->CreateStatus(INVALID_ARGUMENT, "medmamba.Scan2D: an input has the wrong rank");
    if (!status) status = api->GetDimensions(info, shape, rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    return status ? status : api->GetTensorMutableData((Value *)value, data);
}

static Status *compute(void *kernel, Context *context) {
    const Api *api = kernel;
    enum { X, PROJ, DT_WEIGHT, DT_BIAS, A, D, INPUTS };
    static const size_t ranks[INPUTS] = {4, 5, 3, 2, 3, 2};
    int64_t shape[INPUTS][5];
    void *data[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
        const Value *value;
        TRY(api->KernelContext_GetInput(context, i, &value));
        TRY(read_tensor(api, value, ranks[i], shape[i], &data[i]));
    }
    const int64_t *x = shape[X], C = x[3], R = shape[DT_WEIGHT][2], N = shape[A][2];
    const int64_t expected[INPUTS][5] = {{x[0], x[1], x[2], C}, {x[0], x[1], x[2], 4, R + 2 * N}, {4, C, R}, {4, C}, {4, C, N}, {4, C}};
    for (size_t i = 0; i < INPUTS; i++)
        for (size_t j = 0; j < ranks[i]; j++)
            if (shape[i][j] != expected[i][j])
                return api->CreateStatus(INVALID_ARGUMENT, "medmamba.Scan2D: the shapes of its inputs do not fit together");
    Value *output;
    void *y;
    TRY(api->KernelContext_GetOutput(context, 0, x, 4, &output));
    TRY(api->GetTensorMutableData(output, &y));
    Scan2d scan = {
        .B = x[0], .H = x[1], .W = x[2], .C = C, .R = R, .N = N, .threads = processors(),
        .x_type = FLOAT32, .proj_type = FLOAT32, .x = data[X], .proj = data[PROJ], .dt_weight = data[DT_WEIGHT],
        .dt_bias = data[DT_BIAS], .A = data[A], .D = data[D], .y = y,
    };
    Host host = {api, context};
    pool_borrow(run_in_host, &host);
    int failed = medmamba_scan_2d_forward(medmamba_best_variant(), &scan);
    pool_borrow(NULL, NULL);
    return failed ? api->CreateStatus(FAIL, "medmamba.Scan2D ran out of memory") : NULL;
}

static const char *name(const Operator *o) { (void)o; return "Scan2D"; }
static const char *any_provider(const Operator *o) { (void)o; return NULL; }  // NULL: the CPU
static int type_of(const Operator *o, size_t i) { (void)o, (void)i; return TENSOR_OF_FLOAT; }
static size_t input_count(const Operator *o) { (void)o; return 6; }
static size_t output_count(const Operator *o) { (void)o; return 1; }
static int required(const Operator *o, size_t i) { (void)o, (void)i; return 0; }
static int memory_of(const Operator *o, size_t i) { (void)o, (void)i; return 0; }
static int not_variadic(const Operator *o) { (void)o; return 0; }
static int first_version(const Operator *o) { (void)o; return 1; }
static int last_version(const Operator *o) { (void)o; return 1; }
static void destroy(void *kernel) { (void)kernel; }
static Status *create(const Operator *o, const Api *api, const void *info, void **kernel) {
    (void)o, (void)info;
    *kernel = (void *)api;  // the only state of a kernel
    return NULL;
}

static const Operator scan_operator = {
    .version = API_VERSION,
    .GetName = name,
    .GetExecutionProviderType = any_provider,
    .GetInputType = type_of,
    .GetInputTypeCount = input_count,
    .GetOutputType = type_of,
    .GetOutputTypeCount = output_count,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = required,
    .GetOutputCharacteristic = required,
    .GetInputMemoryType = memory_of,
    .GetVariadic = {not_variadic, not_variadic, not_variadic, not_variadic},
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = first_version,
    .GetEndVersion = last_version,
};

// Pins this library: a session unloads its libraries when it ends, while this one keeps memory for later calls.
static void stay_loaded(void) {
#if defined(_WIN32)
    HMODULE self;
    DWORD flags = GET_MODULE_HANDLE_EX_FLAG_FROM_ADDRESS | GET_MODULE_HANDLE_EX_FLAG_PIN;
    GetModuleHandleExA(flags, (const char *)&scan_operator, &self);
#else
    Dl_info self;
    if (dladdr(&scan_operator, &self)) dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD | RTLD_NODELETE);
#endif
}

// The entry point, which ONNX Runtime looks up by this name.
EXPORT Status *RegisterCustomOps(SessionOptions *options, const ApiBase *base) {
    const Api *api = base->GetApi(API_VERSION);
    if (!api) return base->GetApi(1)->CreateStatus(FAIL, "medmamba.Scan2D needs onnxruntime 1.20 or newer");
    stay_loaded();
    Domain *domain;
    TRY(api->CreateCustomOpDomain("medmamba", &domain));
    TRY(api->CustomOpDomain_Add(domain, &scan_operator));
    return api->AddCustomOpDomain(options, domain);
}
